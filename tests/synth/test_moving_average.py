"""A generator's moving average: how it follows, the images it makes, the parts it leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import PartitionSpec

from dfkd_jax import augment, parallel, synth, tasks
from dfkd_jax.synth import Factors, priorities, replay
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.moving_average import MovingAverage

METHODS = ('dfq', 'cu_dfkd', 'fast_dfkd', 'ssd_kd', 'nayer')
DECAY, SAMPLES = 0.75, 12
each_method = pytest.mark.parametrize('name', METHODS)


def created(name, **changes):
  at_hand = {
      'generator': toys.generator(), 'image_shape': toys.IMAGE,
      'task': tasks.classification(toys.CLASSES), 'factors': Factors(one_hot=1.0, adversarial=0.5),
      'num_steps': 2, 'latent_dim': 7, 'batch_size': 5, 'sample_batch_size': SAMPLES,
      'capacity': 20, 'augment': augment.identity, 'generator_lr': 1e-2, 'ema_decay': DECAY,
      **changes}
  taken = synth.parameters(name)
  return synth.create(name, **{key: value for key, value in at_hand.items() if key in taken})


@functools.cache
def called(name, calls=2, **changes):
  """The states before the first call and after each."""
  method = created(name, **changes)
  state, synthesize = (
      toys.jit(method.init)(jax.random.key(0), toys.teacher()), toys.jit(method.synthesize))
  states = [state]
  for index in range(calls):
    state, _ = synthesize(state, jax.random.key(10 + index), toys.teacher(), toys.student())
    states.append(state)
  return states


def inner(state):
  """CuDFKD keeps the generator's state in its own."""
  return getattr(state, 'online', state)


def of_step(state):
  """What is averaged, where the generator goes on from where the inner steps left it."""
  state = inner(state)
  return state.meta_params if hasattr(state, 'meta_params') else state.variables


def assert_close(tree, other, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, other)


def same(tree, other):
  return jax.tree.structure(tree) == jax.tree.structure(other) and all(
      jax.tree.leaves(jax.tree.map(np.array_equal, tree, other)))


@pytest.mark.parametrize(('name', 'changes'), [
    ('dfq', dict(num_steps=1)), ('cu_dfkd', dict(num_steps=1, init_std=0.1)),
    ('fast_dfkd', dict(meta='sequential')), ('nayer', dict(redraw_every=5))])
def test_it_follows_the_generator(name, changes):
  """By hand, as the generator goes on from the inner steps; with a buffer, from its first call."""
  states = called(name, 3, **changes)
  if hasattr(states[0], 'buffer'):
    states = states[1:]
  expected = inner(states[0]).ema
  assert_close(expected, of_step(states[0]), rtol=1e-6, atol=1e-8)
  for state in states[1:]:
    expected = jax.tree.map(
        lambda old, new: DECAY * old + (1 - DECAY) * new, expected, of_step(state))
    assert_close(inner(state).ema, expected, rtol=1e-5, atol=1e-6)
  assert not same(inner(states[-1]).ema, of_step(states[-1]))


def test_without_memory_it_is_the_generator():
  """After the last of a call's steps, not before."""
  state = called('dfq', 1, ema_decay=0.0)[-1]
  assert_close(state.ema, state.variables, rtol=0)


def test_a_generator_drawn_anew_begins_a_new_average():
  """With the generator's steps frozen, the average is the generator itself, old or new."""
  states = called('nayer', 4, redraw_every=2, generator_lr=0.0)
  for state in states[1:]:
    assert_close(state.ema, state.meta_params, rtol=1e-6, atol=1e-8)
  assert not same(states[2].ema, states[3].ema)


@pytest.mark.parametrize('meta', ['fomaml', 'reptile'])
def test_it_is_of_the_adapted_copies_not_of_the_meta_generator(meta):
  """It averages the ends of both tasks' inner steps, as the sequential generator does."""
  found, adapted = (called('fast_dfkd', 1, meta=of, num_tasks=2, task_map='map')[-1]
                    for of in (meta, 'sequential'))
  assert_close(found.ema, adapted.meta_params, rtol=1e-4, atol=1e-6)
  assert not same(found.ema, found.meta_params)


def test_a_reset_begins_a_new_average():
  """What it was of the first layers before has no share in it."""
  before, after = called('fast_dfkd', 2, reset_after=1, generator_lr=0.0)[1:]
  assert_close(after.ema, after.meta_params, rtol=1e-6, atol=1e-8)
  assert not same(before.ema, after.ema)


@pytest.mark.parametrize('name', ['dfq', 'fast_dfkd'])
def test_the_generator_does_not_know_of_it(name):
  """Without, the same generator, up to rounding."""
  found, expected = called(name), called(name, ema_decay=None)
  assert expected[-1].ema is None
  assert_close(of_step(found[-1]), of_step(expected[-1]), rtol=1e-3, atol=1e-5)


@each_method
def test_a_state_made_outside_of_jit_may_be_donated(name):
  """The average is an array of its own from the start, else one buffer would be donated twice."""
  method = created(name, **{'init_std': 0.1} if name == 'cu_dfkd' else {})
  state = method.init(jax.random.key(0), toys.teacher())
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
  assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(('share', 'number'), [
    (0.2, 1), pytest.param(0.5, 3, marks=pytest.mark.exhaustive),
    pytest.param(0.9, 5, marks=pytest.mark.exhaustive)])
@each_method
def test_its_share_of_each_tasks_images(name, share, number):
  """An average with zero parameters makes grey images, the last of each task's six."""
  changes = dict(ema_share=share, num_tasks=2, task_map='map')
  method, state = created(name, **changes), called(name, 1, num_tasks=2, task_map='map')[-1]
  blank = inner(state).replace(ema=jax.tree.map(jnp.zeros_like, inner(state).ema))
  state = state.replace(online=blank) if hasattr(state, 'online') else blank
  batch = toys.jit(method.sample)(state, jax.random.key(3))
  grey = (np.abs(batch.images - 0.5) < 1e-6).all((1, 2, 3)).reshape(2, 6)
  np.testing.assert_array_equal(grey, np.broadcast_to(np.arange(6) >= 6 - number, (2, 6)))
  assert (batch.labels.shape, batch.slots.shape) == ((SAMPLES,), (SAMPLES,))
  np.testing.assert_array_equal(np.asarray(batch.slots)[grey.ravel()], -1)
  np.testing.assert_array_equal(np.asarray(batch.labels)[grey.ravel()], -1)
  if hasattr(state, 'buffer'):
    slots = np.asarray(batch.slots).reshape(2, 6)[:, :6 - number]
    assert ((slots // 10) == [[0], [1]]).all()  # Each task's from its own stripe of ten.


@pytest.mark.exhaustive
def test_priorities_are_of_stored_images_only():
  """An image from nowhere counts 1 and changes no slot, not even the last (index -1)."""
  method, state = created('ssd_kd'), called('ssd_kd')[-1]
  batch = method.sample(state, jax.random.key(5))
  stored = np.asarray(batch.slots) >= 0
  assert stored.sum() == SAMPLES // 2
  losses = jnp.linspace(1.0, 9.0, SAMPLES)
  found, weights = method.weigh(state, batch, losses)
  expected, of_stored = method.weigh(
      state, jax.tree.map(lambda leaf: leaf[stored], batch), losses[stored])
  assert same(found, expected)
  np.testing.assert_array_equal(weights[stored], of_stored)
  np.testing.assert_array_equal(weights[~stored], 1)


def test_nowhere_is_no_slot():
  buffer = replay.create(3, (2, 1, 1), 2, num_tasks=2, prioritised=True)
  slots, values = jnp.array([4, -1, 0]), jnp.array([2.0, 7.0, 3.0])
  written = priorities.set_weights(priorities.set_priorities(buffer, slots, values), slots, values)
  np.testing.assert_array_equal(written.priorities, [[3, 0, 0], [0, 2, 0]])
  np.testing.assert_array_equal(written.weights, [[3, 1, 1], [1, 2, 1]])
  np.testing.assert_array_equal(priorities.weights_at(written, slots), [2, 1, 3])


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', ['dfq', 'fast_dfkd'])
def test_four_devices_give_the_same_images_as_one(name):
  state = called(name, 1, num_tasks=4, task_map='map')[-1]
  found = []
  for size in (1, 4):
    def draw(state, key, *, axis, size=size):
      return created(
          name, num_tasks=4 // size, sample_batch_size=SAMPLES // size, capacity=20 // size,
          task_map='map', axis=axis).sample(state, key)[:2]  # Slots are those of each device.

    mesh, spread = parallel.make_mesh(size), parallel.specs(state)
    program = parallel.each_device(draw, mesh, (spread, PartitionSpec()), parallel.SPREAD)
    found.append(jax.device_get(program(parallel.place(mesh, state), jax.random.key(1))))
  assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('name', 'changes', 'message'), [
    ('dfq', dict(ema_decay=1.0), r'ema_decay is 1.0, must be in \[0, 1\), or None'),
    ('fast_dfkd', dict(ema_decay=-0.1), r'ema_decay is -0.1, must be in \[0, 1\)'),
    ('zskt', dict(ema_share=0.0), 'ema_share is 0.0, must leave at least one of the 12 images'),
    ('ssd_kd', dict(ema_share=1.0), 'ema_share is 1.0, must leave at least one of the 12 images'),
    ('fast_dfkd', dict(sample_batch_size=2, num_tasks=2),
     'ema_share is 0.5, must leave at least one of the 1 images'),
    ('fast_dfkd', dict(meta='reinit'),
     'ema_decay is 0.75, must be None where each call has a generator of its own'),
    ('nayer', dict(redraw_every=1), 'ema_decay is 0.75, must be None'),
    ('nayer', dict(meta='fomaml'),
     "redraw_every is 20, must be at least 1, and None where meta is not 'reinit'")])
def test_what_does_not_fit_is_refused(name, changes, message):
  with pytest.raises(ValueError, match=message):
    created(name, **changes)


def test_no_average_is_no_share():
  assert MovingAverage(None, 7.0).num_images(Layout(sample_batch_size=3)) == 0
  shares = [MovingAverage(0.9, share).num_images(Layout(sample_batch_size=7))
            for share in (0.1, 0.5, 0.9)]
  assert shares == [1, 4, 6]
