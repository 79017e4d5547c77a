"""NAYER: classes in, noisy layers drawn anew; the source of each image, a generator's lifetime."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_jax import augment, parallel, synth, tasks
from dfkd_jax.synth import Factors
from dfkd_jax.synth.methods import nayer

EMBEDDINGS = np.random.default_rng(3).normal(size=(toys.CLASSES, 4)).astype(np.float32)
ONE = parallel.REPLICATED
STRATIFIED = tasks.classification(toys.CLASSES, stratified=True)


def created(name='nayer', **changes):
  return synth.create(name, **{
      'generator': toys.generator(), 'image_shape': toys.IMAGE,
      'task': tasks.classification(toys.CLASSES), 'factors': Factors(one_hot=0.5, batch_norm=2.0),
      'num_steps': 2, 'latent_dim': 7, 'batch_size': 8, 'sample_batch_size': 6, 'capacity': 40,
      'augment': augment.identity, **changes})


def called(method, calls):
  """The state before the first call and after each."""
  state, synthesize = (
      toys.jit(method.init)(jax.random.key(0), toys.teacher()), toys.jit(method.synthesize))
  states = [state]
  for index in range(calls):
    state, _ = synthesize(state, jax.random.key(10 + index), toys.teacher(), None)
    states.append(state)
  return states


def same(tree, other):
  return all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, other)))


def test_latents_equal_a_loop_over_images():
  labels = jnp.array([2, 0, 2, 4, 2, 0])
  layers = nayer.draw_layers(jax.random.key(0), 3, 4, 7)
  layers = layers.replace(bias=jax.random.normal(jax.random.key(3), layers.bias.shape))
  found, seen = (
      nayer.decode_latents(layers, labels, EMBEDDINGS), dict.fromkeys(range(toys.CLASSES), -1))
  for row, label in zip(found, labels.tolist(), strict=True):
    seen[label] += 1
    kernel, bias = (np.asarray(leaf[seen[label]]) for leaf in (layers.kernel, layers.bias))
    np.testing.assert_allclose(row, EMBEDDINGS[label] @ kernel + bias, rtol=1e-5, atol=1e-6)


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 9), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**31))
def test_no_two_images_of_a_batch_come_from_the_same_latent(num_classes, batch_size, size, seed):
  """As few noisy layers as there can be: one for every so many images as there are classes."""
  key_layers, key_labels, key_embeddings = jax.random.split(jax.random.key(seed), 3)
  layers = nayer.draw_layers(key_layers, -(-batch_size // num_classes), size, 5)
  labels = tasks.classification(num_classes, stratified=True).sample_labels(key_labels, batch_size)
  embeddings = nayer.normalise(jax.random.normal(key_embeddings, (num_classes, size)))
  latents = np.asarray(nayer.decode_latents(layers, labels, embeddings))
  assert latents.shape == (batch_size, 5)
  assert len(np.unique(latents, axis=0)) == batch_size


def test_embeddings_are_normalised_as_by_a_batch_norm():
  given = np.column_stack([
      EMBEDDINGS * [1, 10, 0.1, 3] + [5, -5, 0, 1], np.full(toys.CLASSES, 2.0)])
  found = np.asarray(nayer.normalise(jnp.asarray(given)))
  np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(found.std(0), [1, 1, 1, 1, 0], atol=2e-3)
  np.testing.assert_allclose(np.corrcoef(found[:, 1], given[:, 1])[0, 1], 1, rtol=1e-5)


def test_noisy_layers_are_standard_normal():
  layers = nayer.draw_layers(jax.random.key(1), 4, 30, 50)
  assert (layers.kernel.shape, layers.bias.shape) == ((4, 30, 50), (4, 50))
  np.testing.assert_allclose([layers.kernel.mean(), layers.kernel.std()], [0, 1], atol=0.03)
  assert not np.asarray(layers.bias).any()


@functools.cache
def frozen():
  """Seven calls without a step of the generator or of the layers: what changes was drawn anew."""
  return called(created(
      num_steps=1, generator_lr=0.0, latent_lr=0.0, redraw_every=3, batch_size=15, capacity=15), 7)


def test_a_generator_lives_for_so_many_calls():
  states = frozen()[1:]
  lasts = [same(old.meta_params, new.meta_params) for old, new in itertools.pairwise(states)]
  assert lasts == [True, True, False, True, True, False]
  assert not same(frozen()[0].meta_params, states[0].meta_params)


def test_noisy_layers_are_drawn_anew_in_every_call_and_make_different_images():
  """Fifteen images, three a class; random labels would exceed the three layers of some class."""
  for state in frozen()[1:]:
    assert len(np.unique(state.buffer.images.reshape(15, -1), axis=0)) == 15
  first, second = (state.buffer.images for state in frozen()[1:3])  # The same generator.
  assert not np.array_equal(first, second)


def test_it_is_the_loop_of_fast_dfkd_with_other_latents():
  """Its layers handed to FastDFKD, whose generator goes on: the same images, to the bit."""
  one_hot = jnp.eye(toys.CLASSES)
  lent = created(
      'fast_dfkd', task=STRATIFIED, meta='sequential', latent_lr=4e-3, generator_lr=4e-3,
      sample_latents=lambda key, shape: nayer.draw_layers(key, 2, toys.CLASSES, shape[1]),
      decode=lambda layers, labels: nayer.decode_latents(layers, labels, nayer.normalise(one_hot)))
  found, expected = (
      called(created(meta='sequential', redraw_every=None), 3)[-1], called(lent, 3)[-1])
  assert same(found, expected)
  assert float(found.buffer.images[:, :24].std()) > 1


@pytest.mark.parametrize('std', [None, 0.3])
def test_a_generator_is_drawn_as_it_draws_itself_or_narrowly(std):
  (first,) = called(
      created(generator=toys.package_generator(width=8), redraw_std=std, generator_lr=0.0), 1)[1:]
  kernel = first.meta_params['l1_0']['kernel']
  np.testing.assert_allclose(
      kernel.std(), 0.3 if std else 1 / np.sqrt(3 * kernel.shape[0]), rtol=0.05)


def test_four_devices_equal_four_tasks(x64):
  """Each task has noisy layers of its own, and the generator goes on from their average."""
  networks = toys.float64(toys.teacher())
  create = lambda num_tasks, axis: created(
      num_tasks=num_tasks, capacity=10 * num_tasks, sample_batch_size=2 * num_tasks, task_map='map',
      axis=axis, ema_decay=0.5)
  state = toys.jit(create(4, None).init)(jax.random.key(0), networks)
  found = []
  for size in (1, 4):
    def call(state, key, teacher, *, axis, size=size):
      return create(4 // size, axis).synthesize(state, key, teacher, None)

    mesh, spread = parallel.make_mesh(size), parallel.specs(state)
    program = toys.jit(parallel.each_device(call, mesh, (spread, ONE, ONE), (spread, ONE)))
    placed = parallel.place(mesh, state)
    for index in range(2):
      placed, _ = program(placed, jax.random.key(index), parallel.place(mesh, networks))
    found.append(jax.device_get(placed))
  for name in ('meta_params', 'ema', 'past'):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10),
                 getattr(found[1], name), getattr(found[0], name))
  assert np.abs(found[0].buffer.images.astype(int) - found[1].buffer.images).max() <= 1


def test_layers_move_with_the_generator():
  still, moving = (called(created(latent_lr=rate, num_steps=3, keep='last'), 1)[-1]
                   for rate in (0.0, None))
  assert not np.array_equal(still.buffer.images, moving.buffer.images)


@pytest.mark.exhaustive
def test_embeddings_matter():
  one, other = (called(created(embeddings=found), 1)[-1]
                for found in (EMBEDDINGS, EMBEDDINGS[::-1]))
  assert not np.array_equal(one.buffer.images, other.buffer.images)


def test_latents_may_be_maps():
  method = created(
      generator=toys.Maps(), latent_dim=(3, 2, 4), num_tasks=2, capacity=80,
      factors=Factors(one_hot=1.0))
  state = called(method, 1)[-1]
  assert state.buffer.images.shape == (2, 40, *toys.IMAGE)
  assert np.isfinite(jax.tree.leaves(state.meta_params)[0]).all()


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(embeddings=np.ones((4, 3))),
     r'embeddings are \(4, 3\), must be \(5, E\): one for each class'),
    (dict(embeddings=np.ones(5)), r'embeddings are \(5,\), must be \(5, E\)'),
    (dict(embeddings=np.ones((5, 0))), r'embeddings are \(5, 0\), must be \(5, E\)'),
    (dict(embeddings=np.where(EMBEDDINGS > 1, np.nan, EMBEDDINGS)),
     'embeddings are not all finite'),
    (dict(embeddings=EMBEDDINGS[[0, 1, 2, 3, 1]].tolist()),
     'embeddings of two classes are the same'),
    (dict(task=tasks.segmentation(toys.CLASSES)), 'The task has no classes to ask for'),
    (dict(redraw_every=0), 'redraw_every is 0, must be at least 1'),
    (dict(redraw_std=0.0), 'redraw_std is 0.0, must be above 0, or None'),
    (dict(reset_after=3), "reset_after is 3, must be None where meta is 'reinit'")])
def test_what_does_not_fit_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    created(**changes)
