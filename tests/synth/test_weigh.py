"""SSD-KD's recursion of priorities and importance weights, by hand and at its fixed point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from buffers import SHAPE, K, stripes

from dfkd_jax import parallel, synth, tasks
from dfkd_jax.synth import priorities as priority
from dfkd_jax.synth import replay
from dfkd_jax.synth.methods import ssd_kd
from dfkd_jax.types import Batch


def method(**changes):
  """SSD-KD, of which only `sample` and `weigh` are asked for."""
  return synth.create('ssd_kd', **{
      'generator': toys.generator(), 'image_shape': SHAPE, 'task': tasks.classification(K),
      'factors': synth.Factors(one_hot=1.0), 'capacity': 12, 'sample_batch_size': 6,
      'clip_weights': None, **changes})


def with_buffer(buffer):
  return ssd_kd.State(
      latents=None, step=jnp.int32(0), meta_params={}, meta_opt_state=(), past={}, buffer=buffer)


def drawn(*slots):
  slots = jnp.array(slots)
  return Batch(jnp.zeros((len(slots), *SHAPE)), jnp.zeros_like(slots), slots)


def test_weigh_by_hand():
  """The old weights weigh the losses; the priority is the weighed loss; then the weight changes."""
  buffer = stripes([[1.0, 2.0, 3.0, 4.0, 9.0]], size=4)
  buffer = buffer.replace(weights=jnp.array([[1.0, 0.5, 2.0, 1.0, 1.0]]))
  state, weights = method(beta=0.5, epsilon=0.1).weigh(
      with_buffer(buffer), drawn(2, 1, 2), jnp.array([0.5, 3.0, 2.5]))
  np.testing.assert_allclose(weights, [2, 0.5, 2], rtol=1e-6)
  np.testing.assert_allclose(state.buffer.priorities, [[1, 1.5, 5, 4, 9]], rtol=1e-6)
  total = 1 + 1.5 + 5 + 4 + 4 * 0.1
  renewed = [(4 * 1.6 / total) ** -0.5, (4 * 5.1 / total) ** -0.5]
  np.testing.assert_allclose(state.buffer.weights, [[1, *renewed, 1, 1]], rtol=1e-6)


def test_a_full_warm_up_is_drawn_whole_before_anything_is_drawn_often():
  """64 new images with losses of 100: a fixed priority of 1 would starve most of them."""
  made = method(capacity=64, sample_batch_size=8)
  state = with_buffer(replay.add(
      replay.create(64, SHAPE, K, prioritised=True), jnp.zeros((1, 64, *SHAPE)),
      jnp.zeros((1, 64), jnp.int32)))

  @toys.jit
  def draws(state, keys):
    def step(state, key):
      batch = made.sample(state, key)
      state, _ = made.weigh(state, batch, 100.0 + batch.slots)
      return state, batch.slots
    return jax.lax.scan(step, state, keys)

  state, slots = draws(state, jax.random.split(jax.random.key(0), 24))
  uniform = 64 * (1 - (1 - 1 / 64)**(24 * 8))  # 61, if it were at random.
  assert len(np.unique(slots)) >= uniform - 4
  assert (np.asarray(state.buffer.priorities) < 0).sum() == 64 - len(np.unique(slots))


def test_weights_are_clipped_where_they_are_kept():
  losses = jnp.array([4.0, 0.0, 1e-4])
  weigh = lambda **changes: method(beta=0.9, **changes).weigh(
      with_buffer(stripes([[1.0, 1.0, 1.0]])), drawn(0, 1, 2), losses)[0].buffer.weights[0]
  free, bounded = weigh(), weigh(clip_weights=10.0)
  assert float(free.min()) < 1 < 10 < float(free[2]) < float(free[1])
  np.testing.assert_allclose(bounded, np.minimum(free, 10), rtol=1e-6)


def test_weights_by_their_largest_over_all_devices():
  """Normalised weights reach the student only: what is kept is the same."""
  kept = jnp.array([[[0.5, 1.0, 4.0]], [[2.0, 1.0, 8.0]]])
  buffers = [stripes([[1.0, 1.0, 1.0]]).replace(weights=weights) for weights in kept]
  batch, losses = drawn(1, 0), jnp.array([2.0, 4.0])
  alone = [method(normalise_weights='max').weigh(with_buffer(buffer), batch, losses)
           for buffer in buffers]
  np.testing.assert_allclose([weights for _, weights in alone], [[1, 0.5], [0.5, 1]])
  together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(with_buffer, buffers))
  over = method(normalise_weights='max', axis='devices').weigh
  states, weights = jax.vmap(over, in_axes=(0, None, None), axis_name='devices')(
      together, batch, losses)
  np.testing.assert_allclose(weights, [[0.5, 0.25], [0.5, 1]])
  plain = [method().weigh(with_buffer(buffer), batch, losses) for buffer in buffers]
  for index, (state, unscaled) in enumerate(plain):
    np.testing.assert_array_equal(unscaled, [kept[index, 0, 1], kept[index, 0, 0]])
    for name in ('priorities', 'weights'):
      np.testing.assert_allclose(
          getattr(states.buffer, name)[index], getattr(state.buffer, name), rtol=1e-6)
      np.testing.assert_array_equal(
          getattr(alone[index][0].buffer, name), getattr(state.buffer, name))


def settle(beta, losses, steps=60):
  """Weigh every slot again and again under the same losses [M, N].

  Returns the last probabilities, and the weights.
  """
  weigh = toys.jit(method(beta=beta, epsilon=1e-9, capacity=losses.size).weigh)
  state, batch = with_buffer(stripes(np.ones_like(losses))), drawn(*range(losses.size))
  for _ in range(steps):
    state, _ = weigh(state, batch, jnp.asarray(losses.ravel()))
  return priority.probabilities(state.buffer, 1e-9), state.buffer.weights


@pytest.mark.parametrize(('beta', 'exponent'), [(0.0, 1.0), (0.5, 2 / 3), (0.7, 1 / 1.7)])
def test_priorities_settle_at_a_power_of_the_loss(beta, exponent, x64):
  losses = np.random.default_rng(0).exponential(size=(2, 53)) + 1e-3
  found, weights = settle(beta, losses)
  expected = losses**exponent / (losses**exponent).sum(1, keepdims=True)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
  np.testing.assert_allclose(weights, (53 * expected) ** -beta, rtol=1e-4)
  np.testing.assert_allclose((found / (53 * found)).sum(1), 1, rtol=1e-12)


def test_at_beta_1_they_would_flip(x64):
  """Between the losses and uniform, for ever: why it is refused."""
  losses, slots, buffer = jnp.array([1.0, 2.0, 5.0]), jnp.arange(3), stripes([[1.0, 1.0, 1.0]])
  for index in range(6):
    weights = priority.importance_weights(buffer, slots, 1.0, epsilon=1e-12)
    buffer = priority.set_priorities(buffer, slots, weights * losses)
    expected = [1 / 3] * 3 if index % 2 else [1 / 8, 2 / 8, 5 / 8]
    np.testing.assert_allclose(priority.probabilities(buffer, 1e-12)[0], expected, rtol=1e-9)
  with pytest.raises(ValueError, match=r'beta is 1.0, must be in \[0, 1\)'):
    method(beta=1.0)


def test_a_loss_of_0_stays_within_reach():
  state = with_buffer(stripes([[1.0, 1.0, 1.0, 1.0]]))
  state, _ = method().weigh(state, drawn(0, 1, 2, 3), jnp.array([3.0, 0.0, 0.0, 40.0]))
  chances = priority.probabilities(state.buffer)[0]
  assert (np.asarray(chances) > 0).all()
  np.testing.assert_allclose(chances[1], 1e-6 / 43, rtol=1e-5)
  # The draw is as good as uniform.
  slots = priority.sample_by_priority(jax.random.key(0), state.buffer, 6, epsilon=1e3).slots
  assert set(np.asarray(slots).tolist()) - {0, 3}


def test_four_devices_draw_and_weigh_as_one():
  """Of four stripes; slots count from each device's first."""
  state = with_buffer(stripes(np.random.default_rng(1).exponential(size=(4, 5))))
  found = []
  for size in (1, 2, 4):
    mesh, spread = parallel.make_mesh(size), parallel.specs(state)

    def step(state, key, *, axis, size=size):
      of = method(num_tasks=4 // size, capacity=20 // size, sample_batch_size=12 // size, axis=axis,
                  normalise_weights='max')
      batch = of.sample(state, key)
      return *of.weigh(state, batch, 3 * batch.images[:, 0, 0, 0] + 0.1), batch.images, batch.labels

    each = parallel.SPREAD
    program = toys.jit(parallel.each_device(
        step, mesh, (spread, parallel.REPLICATED), (spread, each, each, each)))
    result = parallel.place(mesh, state)
    for seed in range(2):
      result, *rest = program(result, jax.random.key(seed))
    found.append(jax.device_get((result, rest)))
  for other in found[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), other, found[0])
