"""SSD-KD's modulation: by how much the one_hot term of each image, or pixel, counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_jax import augment, models, synth, tasks
from dfkd_jax.losses import curriculum, inversion
from dfkd_jax.synth import generators, replay
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.modulation import Modulation


def test_diversity_by_hand():
  histogram = jnp.array([6, 0, 3, 1])
  classes = jnp.array([[0, 1, 2], [3, 0, 0]])
  np.testing.assert_allclose(
      curriculum.diversity(classes, histogram), [[0.4, 1, 0.7], [0.9, 0.4, 0.4]], rtol=1e-6)


@pytest.mark.parametrize(('num_classes', 'balanced', 'thrice'), [(10, 0.9, 0.7), (100, 0.99, 0.97)])
def test_diversity_of_a_balanced_buffer_and_of_a_class_thrice_as_common(
    num_classes, balanced, thrice):
  even = jnp.full(num_classes, 50)
  np.testing.assert_allclose(
      curriculum.diversity(jnp.arange(num_classes), even), balanced, rtol=1e-6)
  uneven = np.full(num_classes, 97)
  uneven[0] = uneven[1:].sum() * 3 / (num_classes - 3)
  share = uneven[0] / uneven.sum() * num_classes
  assert abs(share - 3) < 0.02
  np.testing.assert_allclose(
      curriculum.diversity(jnp.array(0), jnp.asarray(uneven)), thrice, atol=1e-3)
  ours = curriculum.diversity(jnp.array([0, 1]), jnp.asarray(uneven), normalised=True)
  np.testing.assert_allclose(ours, [1 / share, 1], rtol=1e-6)
  np.testing.assert_array_equal(
      curriculum.diversity(jnp.array([0, 1]), even, normalised=True), [1, 1])


@pytest.mark.parametrize('normalised', [False, True])
def test_diversity_is_1_while_there_is_nothing(normalised):
  found = curriculum.diversity(jnp.arange(3), jnp.zeros(3, jnp.int32), normalised=normalised)
  np.testing.assert_array_equal(found, np.ones(3))
  found = curriculum.diversity(jnp.array([1]), jnp.array([7, 0, 0]), normalised=normalised)
  np.testing.assert_array_equal(found, [1])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 50_000), min_size=3, max_size=3), st.booleans())
def test_diversity_lies_in_0_1_and_falls_with_the_count(counts, normalised):
  found = np.asarray(curriculum.diversity(jnp.arange(3), jnp.array(counts), normalised=normalised))
  assert (found >= 0).all()
  assert (found <= 1).all()
  assert (np.diff(found[np.argsort(counts)]) <= 0).all()


def test_difficulty_by_hand():
  chances = np.array([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05]])
  found = curriculum.difficulty(jnp.log(chances) + 3.0, jnp.array([0, 2]), 2.0)
  np.testing.assert_allclose(found, [0.3**2, 0.95**2], rtol=1e-5)
  np.testing.assert_allclose(
      curriculum.difficulty(jnp.log(chances), jnp.array([1, 1]), 0.5), [0.8**0.5, 0.1**0.5],
      rtol=1e-5)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize('ahead', [-300.0, -30.0, 0.0, 15.0, 30.0, 300.0])
def test_difficulty_and_its_gradient_are_finite_from_p_0_to_p_1_in_float32(gamma, ahead):
  """1 - p is right where p itself rounds to 1: of K - 1 others that lie `ahead` behind."""
  logits = jnp.array([ahead, 0.0, 0.0, 0.0], jnp.float32)
  value, grad = jax.value_and_grad(curriculum.difficulty)(logits, jnp.array(0), gamma)
  others = np.log(3) - np.logaddexp(ahead, np.log(3))
  np.testing.assert_allclose(value, np.exp(gamma * others), rtol=2e-5, atol=1e-38)
  own = -gamma * np.exp(gamma * others) * np.exp(ahead - np.logaddexp(ahead, np.log(3)))
  np.testing.assert_allclose(
      grad, own * np.array([1, -1 / 3, -1 / 3, -1 / 3]), rtol=2e-5, atol=1e-7)


def test_difficulty_at_its_ends():
  ends = lambda gamma: np.asarray(curriculum.difficulty(
      jnp.array([[1e3, 0.0], [-1e3, 0.0]]), jnp.array([0, 0]), gamma))
  np.testing.assert_array_equal(ends(2.0), [0, 1])
  np.testing.assert_array_equal(ends(0.0), [1, 1])


@functools.partial(jax.jit, static_argnums=2)
def focal(logits, classes, gamma):
  return curriculum.difficulty(logits, classes, gamma) * inversion.one_hot(logits, classes)


@pytest.mark.parametrize('gamma', [0.5, 2.0])
def test_difficulty_times_one_hot_is_the_focal_loss_with_its_gradient(gamma, x64):
  """Of two classes, against Optax; of five, its derivative against differences and by hand."""
  margins = jnp.linspace(-6, 6, 13)
  two, grad = jax.vmap(jax.value_and_grad(
      lambda margin: focal(jnp.stack([margin, 0.0]), jnp.array(0), gamma)))(margins)
  theirs, their_grad = jax.vmap(jax.value_and_grad(
      lambda margin: optax.losses.sigmoid_focal_loss(
          margin, jnp.ones_like(margin), gamma=gamma)))(margins)
  np.testing.assert_allclose(two, theirs, rtol=1e-10)
  np.testing.assert_allclose(grad, their_grad, rtol=1e-8)

  logits, label = jnp.asarray(np.random.default_rng(0).normal(size=5) * 2), jnp.array(3)
  found = jax.grad(focal)(logits, label, gamma)
  step = 1e-6 * np.eye(5)
  differences = [
      (focal(logits + e, label, gamma) - focal(logits - e, label, gamma)) / 2e-6 for e in step]
  np.testing.assert_allclose(found, differences, rtol=1e-6, atol=1e-9)
  p = np.asarray(jax.nn.softmax(logits))
  # The derivative of -(1 - p)^gamma log p.
  by_p = gamma * (1 - p[3])**(gamma - 1) * np.log(p[3]) - (1 - p[3])**gamma / p[3]
  np.testing.assert_allclose(found, by_p * p[3] * (np.eye(5)[3] - p), rtol=1e-9)


ASKED = np.array([4, 0, 1, 3], np.int32)
# The teacher sees two classes in them, and is sure of some images and unsure of others.
LATENTS = np.random.default_rng(4).normal(size=(4, 7)).astype(np.float32)
COUNTS = np.array([5, 1, 0, 2, 4], np.int32)


def method(**changes):
  """SSD-KD of one inner step that has nothing but the one_hot term to minimise."""
  asks = tasks.classification(toys.CLASSES)._replace(sample_labels=lambda *_: jnp.asarray(ASKED))
  return synth.create('ssd_kd', **{
      'generator': toys.generator(), 'image_shape': toys.IMAGE, 'task': asks,
      'factors': synth.Factors(one_hot=1.0), 'num_steps': 1, 'latent_dim': 7, 'batch_size': 4,
      'sample_batch_size': 6, 'capacity': 12, 'augment': augment.identity,
      'sample_latents': lambda *_: LATENTS, 'new_priority': 'modulation', **changes})


@functools.cache
def start():
  """The same for all: a generator, and a buffer that has counted COUNTS."""
  state = toys.jit(method().init)(jax.random.key(0), toys.teacher())
  return state.replace(buffer=state.buffer.replace(histogram=jnp.asarray(COUNTS)))


def call(**changes):
  """Meta-gradient, mean of the one_hot term, and the modulations."""
  state, metrics = toys.jit(method(**changes).synthesize)(
      start(), jax.random.key(1), toys.teacher(), None)
  # After one update of a fresh Adam its first moment is 1 - b1 = 1/2 of the gradient.
  grads = jax.tree.map(lambda mu: 2 * mu, optax.tree_utils.tree_get(state.meta_opt_state, 'mu'))
  return grads, metrics['one_hot'], -state.buffer.priorities[0, :4]


@toys.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def written_out(params, stop, asked, gamma, diversity, counted):
  """Its mean over the images, and the modulation; `stop` and so on are 0 or 1."""
  logits = toys.teacher()(generators.render(toys.generator(), params, LATENTS)).logits
  seen = logits.argmax(-1)
  targets = jnp.where(asked, ASKED, seen)
  p = jnp.take_along_axis(jax.nn.softmax(logits), targets[:, None], 1)[:, 0]
  classes = jnp.where(counted, ASKED, seen)
  phi = (1 - p)**gamma * (1 - diversity * jnp.asarray(COUNTS)[classes] / COUNTS.sum())
  phi = stop * jax.lax.stop_gradient(phi) + (1 - stop) * phi
  return -(phi * jnp.log(p)).mean(), phi


@pytest.mark.parametrize(('changes', 'expected'), [
    (dict(), (0, 1, 2.0, 1, 0)),
    (dict(stop_modulation=True), (1, 1, 2.0, 1, 0)),
    (dict(label_source='argmax', gamma=0.5), (0, 0, 0.5, 1, 0)),
    (dict(counted='asked'), (0, 1, 2.0, 1, 1)),
    (dict(diversity=False, gamma=1.0), (0, 1, 1.0, 0, 0)),
    (dict(difficulty=False), (0, 1, 0.0, 1, 0))])
def test_the_one_hot_term_counts_by_the_modulation(changes, expected):
  """Its value, what is kept of it, and the gradient that the generator gets."""
  grads, one_hot, kept = call(**changes)
  (value, phi), wanted = written_out(start().meta_params, *map(float, expected))
  assert float(phi.max() - phi.min()) > 0.05
  np.testing.assert_allclose(kept, phi, rtol=1e-4)
  np.testing.assert_allclose(one_hot, [value], rtol=1e-4)
  assert max(toys.distances(grads, wanted).values()) <= 1e-4
  if not changes:  # The gradient through the modulation is no trifle.
    _, without = written_out(start().meta_params, 1.0, *map(float, expected[1:]))
    assert min(toys.distances(without, wanted).values()) > 5e-3


def test_what_the_diversity_counts_is_what_the_buffer_holds():
  """The classes asked for, or those that the teacher saw in the images."""
  for counted in ('seen', 'asked'):
    state, _ = toys.jit(method(counted=counted).synthesize)(
        start(), jax.random.key(1), toys.teacher(), None)
    seen = toys.teacher()(replay.to_float(state.buffer.images[0, :4])).logits.argmax(-1)
    assert not np.array_equal(seen, ASKED)
    np.testing.assert_array_equal(state.buffer.labels[0, :4], ASKED if counted == 'asked' else seen)
    np.testing.assert_array_equal(
        state.buffer.histogram - COUNTS, np.bincount(state.buffer.labels[0, :4], minlength=5))


class Dense(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(4, (3, 3), use_bias=False)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    return nn.Conv(toys.CLASSES, (1, 1), kernel_init=nn.initializers.normal(3.0))(x)


def test_of_pixels_the_modulation_is_averaged_over_each_image():
  """New priorities of each task's images [M, B], though it counts pixel by pixel."""
  teacher, num_tasks = models.create_network(Dense(), jax.random.key(3), toys.IMAGE), 3
  dense = method(
      task=tasks.segmentation(toys.CLASSES), num_tasks=num_tasks, capacity=12 * num_tasks,
      sample_latents=jax.random.normal)
  state = toys.jit(dense.init)(jax.random.key(0), teacher)
  state = state.replace(buffer=state.buffer.replace(histogram=jnp.asarray(COUNTS)))
  key = jax.random.key(1)
  after, metrics = toys.jit(dense.synthesize)(state, key, teacher, None)

  key_latents, *_ = jax.random.split(jax.random.clone(key), 4)
  latents = Latents(7).draw(key_latents, 4, Layout(num_tasks=num_tasks, sample_batch_size=3))
  logits = jax.vmap(lambda z: teacher(
      generators.render(toys.generator(), state.meta_params, z)).logits)(latents)
  p, seen = jax.nn.softmax(logits).max(-1), logits.argmax(-1)
  assert len(np.unique(seen)) > 1
  phi = (1 - jnp.asarray(COUNTS)[seen] / COUNTS.sum()) * (1 - p)**2
  np.testing.assert_allclose(
      -after.buffer.priorities[:, :4], phi.mean((2, 3)), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(metrics['one_hot'], [(phi * -jnp.log(p)).mean()], rtol=1e-4)


def test_without_factors_there_is_no_modulation():
  off = Modulation(diversity=False, difficulty=False)
  assert not off.is_used
  assert off.phi(jnp.zeros((4, 5)), jnp.zeros(4, jnp.int32), jnp.zeros(5)) is None
