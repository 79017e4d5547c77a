"""Draws by priority, importance weights, and the recursion of SSD-KD that joins them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_jax import parallel, synth, tasks
from dfkd_jax.synth import replay
from dfkd_jax.synth.methods import ssd_kd
from dfkd_jax.types import Batch

SHAPE, K = (3, 2, 1), 4


def stripes(priorities, size=None):
  """A buffer with these priorities [M, N], of whose slots the first `size` are live; each image tells its slot."""
  priorities = np.asarray(priorities)
  num_tasks, capacity = priorities.shape
  buffer = replay.create(capacity, SHAPE, K, num_tasks, prioritised=True)
  flat = np.arange(num_tasks * capacity, dtype=np.uint8).reshape(num_tasks, capacity)
  return buffer.replace(
      images=jnp.asarray(np.broadcast_to(flat[..., None, None, None], (num_tasks, capacity, *SHAPE))),
      labels=jnp.asarray(flat % K, jnp.int32), priorities=jnp.asarray(priorities, jnp.result_type(float)),
      size=jnp.int32(capacity if size is None else size))


# What the buffer keeps.


@functools.cache
def program(num):
  """Adding `num` images, compiled once for all examples."""
  del num  # By shape.
  return toys.jit(replay.add)


def pushed(index, num_tasks, num):
  values = np.arange(num_tasks * num).reshape(num_tasks, num) + 7 * index
  images = np.broadcast_to((values % 251 / 255.0)[..., None, None, None], (num_tasks, num, *SHAPE))
  return jnp.asarray(images, jnp.float32), jnp.asarray((3 * values + index) % K, jnp.int32)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 5]), st.booleans()), max_size=9), st.sampled_from([5, 7]),
       st.sampled_from([1, 3]))
def test_any_pushes_and_updates_leave_an_exact_histogram_and_the_priorities_given(pushes, capacity, num_tasks):
  """Against arrays of NumPy; after a push all that is live gets other priorities and weights."""
  buffer = replay.create(capacity, SHAPE, K, num_tasks, prioritised=True)
  labels, priorities = np.full((num_tasks, capacity), -1), np.zeros((num_tasks, capacity))
  weights, written = np.ones((num_tasks, capacity)), 0
  for index, (num, given_priorities) in enumerate(pushes):
    images, new = pushed(index, num_tasks, num)
    own = np.linspace(0.1, 0.9, num_tasks * num, dtype=np.float32).reshape(num_tasks, num) + index
    buffer = program(num)(buffer, images, new, priorities=jnp.asarray(own) if given_priorities else None)
    slots = (written + np.arange(num)) % capacity
    labels[:, slots], weights[:, slots], written = new, 1.0, written + num
    priorities[:, slots] = own if given_priorities else -1
    np.testing.assert_array_equal(buffer.histogram, np.bincount(labels[labels >= 0], minlength=K))
    np.testing.assert_array_equal(buffer.priorities, priorities.astype(np.float32))
    np.testing.assert_array_equal(buffer.weights, weights.astype(np.float32))
    live = min(written, capacity)
    priorities[:, :live] = (priorities[:, :live] * 3 + 0.25) % 2
    weights[:, :live] = 0.5
    buffer = buffer.replace(
        priorities=jnp.asarray(priorities, jnp.float32), weights=jnp.asarray(weights, jnp.float32))


def test_without_priorities_none_are_kept():
  buffer = replay.create(5, SHAPE, K, 2)
  assert (buffer.priorities, buffer.weights) == (None, None)
  added = replay.add(buffer, *pushed(0, 2, 3), priorities=jnp.ones((2, 3)))
  assert (added.priorities, added.weights) == (None, None)
  assert jax.tree.structure(added) == jax.tree.structure(buffer)


@pytest.mark.parametrize('in_float64', [False, True])
def test_the_state_keeps_its_types(in_float64):
  """Also where losses and modulations come in another float type."""
  buffer = replay.create(5, SHAPE, K, 2, prioritised=True)
  with jax.enable_x64(in_float64):
    values = jnp.asarray([0.5, 1.5], jnp.result_type(float))
    after = replay.add(buffer, *pushed(0, 2, 3), priorities=jnp.ones((2, 3)))
    after = replay.set_priorities(after, jnp.array([0, 6]), values)
    after = replay.set_weights(after, jnp.array([0, 6]), values)
  typed = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)
  assert typed(after) == typed(buffer)


def test_live_priorities_are_0_where_no_image_is():
  buffer = stripes([[1.0, 2.0, 3.0], [4.0, 5.0, -6.0]], size=2)
  np.testing.assert_array_equal(replay.live_priorities(buffer), [[1, 2, 0], [4, 5, 0]])


@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e6])
def test_what_is_new_is_on_the_scale_of_what_has_been_drawn(scale):
  """Whatever the losses turn out to be, and in each stripe by itself."""
  buffer = stripes([[-1.0, -0.25, 3 * scale, scale, 99.0], [-1.0, -0.5, -0.5, 0.0, 99.0]], size=4)
  np.testing.assert_allclose(
      replay.live_priorities(buffer), [[3 * scale, 0.75 * scale, 3 * scale, scale, 0], [1, 0.5, 0.5, 0, 0]], rtol=1e-6)
  after = replay.set_priorities(buffer, jnp.array([5, 1]), jnp.array([8 * scale, 5 * scale]))
  np.testing.assert_allclose(
      replay.live_priorities(after), scale * np.array([[5, 5, 3, 1, 0], [8, 4, 4, 0, 0]]), rtol=1e-6)


def test_a_full_warm_up_is_drawn_whole_before_anything_is_drawn_often():
  """64 images that are all new, with losses of 100: at a fixed priority of 1 most of them would be starved."""
  made = method(capacity=64, sample_batch_size=8)
  state = with_buffer(replay.add(
      replay.create(64, SHAPE, K, prioritised=True), jnp.zeros((1, 64, *SHAPE)), jnp.zeros((1, 64), jnp.int32)))

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


# Probabilities and importance weights.


def test_probabilities_by_hand():
  """Each stripe for itself; what lies in dead slots counts nothing."""
  found = replay.probabilities(stripes([[3.0, 0.0, 1.0, 99.0], [0.0, 0.0, 0.0, 99.0]], size=3), epsilon=0.5)
  np.testing.assert_allclose(found, [[3.5 / 5.5, 0.5 / 5.5, 1.5 / 5.5, 0], [1 / 3, 1 / 3, 1 / 3, 0]], rtol=1e-6)


def test_an_empty_buffer_has_no_probabilities_and_finite_weights():
  buffer = replay.create(4, SHAPE, K, prioritised=True)
  np.testing.assert_array_equal(replay.probabilities(buffer), np.zeros((1, 4)))
  assert np.isfinite(replay.importance_weights(buffer, jnp.arange(4), 0.5)).all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1e4), min_size=7, max_size=7), st.integers(1, 7))
def test_probabilities_sum_to_1_and_weights_take_the_bias_back(priorities, size):
  """E_P[1 / (N P)] = 1, where beta is 1; nothing live is out of reach."""
  buffer = stripes([priorities], size)
  chances = np.asarray(replay.probabilities(buffer), np.float64)[0]
  np.testing.assert_allclose(chances.sum(), 1, rtol=1e-6)
  assert (chances[:size] > 0).all()
  weights = replay.importance_weights(buffer, jnp.arange(size), 1.0)
  np.testing.assert_allclose((chances[:size] * weights).sum(), 1, rtol=1e-5)


def test_importance_weights_by_hand():
  """N is the images of a stripe, so that equal priorities weigh 1 however many stripes there are."""
  buffer = stripes([[6.0, 1.0, 1.0, 7.0, 0.0], [2.0, 2.0, 2.0, 2.0, 0.0]], size=4)
  found = replay.importance_weights(buffer, jnp.array([3, 0, 2, 6]), 0.5, epsilon=1e-7)
  np.testing.assert_allclose(found, [(28 / 15) ** -0.5, (24 / 15) ** -0.5, (4 / 15) ** -0.5, 1], rtol=1e-5)
  np.testing.assert_array_equal(replay.importance_weights(buffer, jnp.arange(4), 0.0), np.ones(4))


# Draws.


def test_draws_follow_the_probabilities():
  """Chi-square in each of three stripes, of which seven slots of eleven are live and one has priority 0."""
  priorities = np.zeros((3, 11))
  priorities[0, :7] = [5, 0, 1, 2, 0.5, 3, 1]
  priorities[1, :7] = [0, 1, 1, 1, 1, 1, 20]
  priorities[2, :7] = [9, 8, 7, 6, 5, 4, 0]
  priorities[:, 7:] = 50  # Of no image.
  buffer, share = stripes(priorities, size=7), 30_000
  drawn = toys.jit(lambda key: replay.sample_by_priority(key, buffer, 3 * share, epsilon=0.05))(jax.random.key(0))
  stripe, slot = np.divmod(np.asarray(drawn.slots), 11)
  np.testing.assert_array_equal(stripe, np.repeat([0, 1, 2], share))
  for index in range(3):
    counts = np.bincount(slot[stripe == index], minlength=11)
    odds = priorities[index, :7] + 0.05
    expected = share * odds / odds.sum()
    assert counts[7:].sum() == 0
    assert ((counts[:7] - expected) ** 2 / expected).sum() < 22.5  # Six degrees of freedom, p = 0.001.
  assert not np.array_equal(slot[stripe == 0], slot[stripe == 1])


def test_draws_are_what_the_slots_hold():
  buffer = stripes(np.arange(15.0).reshape(3, 5))
  drawn = replay.sample_by_priority(jax.random.key(1), buffer, 12)
  assert drawn.images.shape == (12, *SHAPE)
  assert (drawn.images.dtype, drawn.labels.dtype, drawn.slots.dtype) == (jnp.float32, jnp.int32, jnp.int32)
  np.testing.assert_array_equal(np.asarray(drawn.slots) // 5, np.repeat([0, 1, 2], 4))
  np.testing.assert_allclose(drawn.images[:, 2, 1, 0], np.asarray(drawn.slots) / 255, rtol=1e-6)
  np.testing.assert_array_equal(drawn.labels, drawn.slots % K)


@pytest.mark.parametrize('size', [1, 3, 6])
def test_equal_priorities_are_drawn_whole_and_nothing_else(size):
  buffer = stripes(np.full((2, 6), 2.0), size)
  slots = np.asarray(replay.sample_by_priority(jax.random.key(0), buffer, 400).slots)
  assert set((slots % 6).tolist()) == set(range(size))


def test_after_the_ring_has_gone_round_what_is_old_is_drawn_no_more():
  buffer = replay.create(6, SHAPE, K, prioritised=True)
  for index in range(3):
    buffer = replay.add(buffer, jnp.full((1, 4, *SHAPE), (index + 1) / 8), jnp.full((1, 4), index))
  drawn = replay.sample_by_priority(jax.random.key(0), buffer, 300)
  assert set(np.asarray(drawn.labels).tolist()) == {1, 2}
  np.testing.assert_array_equal(np.round(drawn.images[:, 0, 0, 0] * 8), drawn.labels + 1)


def test_the_many_that_are_rare_are_all_within_reach():
  """A tail of 4,999 slots with a chance of 4e-8 each; summed in float32 only one in six of them would be met."""
  priorities = np.full((1, 5_000), 4e-8)
  priorities[0, 0] = 1 - priorities[0, 1:].sum()
  images = jnp.zeros((1, 5_000, 1, 1, 1), jnp.uint8)
  buffer = replay.create(5_000, (1, 1, 1), K, prioritised=True).replace(
      images=images, priorities=jnp.asarray(priorities, jnp.float32), size=jnp.int32(5_000))
  draw = jax.jit(lambda key: replay.sample_by_priority(key, buffer, 1_000_000, epsilon=1e-12).slots)
  tail = np.concatenate([slots[slots > 0] for slots in (np.asarray(draw(jax.random.key(seed))) for seed in range(3))])
  assert abs(len(tail) - 600) < 4 * 600**0.5
  distinct = 4_999 * (1 - np.exp(-len(tail) / 4_999))
  assert abs(len(set(tail.tolist())) - distinct) < 4 * (len(tail) - distinct) ** 0.5
  assert (tail == 4_999).sum() < 4  # The last takes no rounding on itself.


# Updates.


def test_only_what_was_drawn_changes_and_duplicates_leave_the_highest():
  buffer = stripes([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
  after = replay.set_priorities(buffer, jnp.array([4, 1, 4, 4, 0]), jnp.array([0.5, 9.0, 0.75, 0.25, -1e-7]))
  np.testing.assert_array_equal(after.priorities, [[0, 9, 3], [4, 0.75, 6]])
  after = replay.set_weights(buffer, jnp.array([4, 1, 4]), jnp.array([0.5, 9.0, 0.5]))
  np.testing.assert_array_equal(after.weights, [[1, 9, 1], [1, 0.5, 1]])
  np.testing.assert_array_equal(replay.weights_at(after, jnp.array([1, 5, 4])), [9, 1, 0.5])


def method(**changes):
  """SSD-KD, of which only `sample` and `weigh` are asked for."""
  return synth.create('ssd_kd', **{
      'generator': toys.generator(), 'image_shape': SHAPE, 'task': tasks.classification(K),
      'factors': synth.Factors(one_hot=1.0), 'capacity': 12, 'sample_batch_size': 6, 'clip_weights': None, **changes})


def with_buffer(buffer):
  return ssd_kd.State(
      latents=None, step=jnp.int32(0), meta_params={}, meta_opt_state=(), past={}, buffer=buffer)


def drawn(*slots):
  slots = jnp.array(slots)
  return Batch(jnp.zeros((len(slots), *SHAPE)), jnp.zeros_like(slots), slots)


def test_weigh_by_hand():
  """Losses count by the weights of before; the priority is the loss so weighed; then the weight is renewed."""
  buffer = stripes([[1.0, 2.0, 3.0, 4.0, 9.0]], size=4)
  buffer = buffer.replace(weights=jnp.array([[1.0, 0.5, 2.0, 1.0, 1.0]]))
  state, weights = method(beta=0.5, epsilon=0.1).weigh(
      with_buffer(buffer), drawn(2, 1, 2), jnp.array([0.5, 3.0, 2.5]))
  np.testing.assert_allclose(weights, [2, 0.5, 2], rtol=1e-6)
  np.testing.assert_allclose(state.buffer.priorities, [[1, 1.5, 5, 4, 9]], rtol=1e-6)
  total = 1 + 1.5 + 5 + 4 + 4 * 0.1
  renewed = [(4 * 1.6 / total) ** -0.5, (4 * 5.1 / total) ** -0.5]
  np.testing.assert_allclose(state.buffer.weights, [[1, *renewed, 1, 1]], rtol=1e-6)


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
  alone = [method(normalise_weights='max').weigh(with_buffer(buffer), batch, losses) for buffer in buffers]
  np.testing.assert_allclose([weights for _, weights in alone], [[1, 0.5], [0.5, 1]])
  together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(with_buffer, buffers))
  over = method(normalise_weights='max', axis='devices').weigh
  states, weights = jax.vmap(over, in_axes=(0, None, None), axis_name='devices')(together, batch, losses)
  np.testing.assert_allclose(weights, [[0.5, 0.25], [0.5, 1]])
  plain = [method().weigh(with_buffer(buffer), batch, losses) for buffer in buffers]
  for index, (state, unscaled) in enumerate(plain):
    np.testing.assert_array_equal(unscaled, [kept[index, 0, 1], kept[index, 0, 0]])
    for name in ('priorities', 'weights'):
      np.testing.assert_allclose(getattr(states.buffer, name)[index], getattr(state.buffer, name), rtol=1e-6)
      np.testing.assert_array_equal(getattr(alone[index][0].buffer, name), getattr(state.buffer, name))


def settle(beta, losses, steps=60):
  """Every slot weighed again and again under losses [M, N] that stay: the probabilities at last, and the weights."""
  weigh = toys.jit(method(beta=beta, epsilon=1e-9, capacity=losses.size).weigh)
  state, batch = with_buffer(stripes(np.ones_like(losses))), drawn(*range(losses.size))
  for _ in range(steps):
    state, _ = weigh(state, batch, jnp.asarray(losses.ravel()))
  return replay.probabilities(state.buffer, 1e-9), state.buffer.weights


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
    weights = replay.importance_weights(buffer, slots, 1.0, epsilon=1e-12)
    buffer = replay.set_priorities(buffer, slots, weights * losses)
    expected = [1 / 3] * 3 if index % 2 else [1 / 8, 2 / 8, 5 / 8]
    np.testing.assert_allclose(replay.probabilities(buffer, 1e-12)[0], expected, rtol=1e-9)
  with pytest.raises(ValueError, match=r'beta is 1.0, must be in \[0, 1\)'):
    method(beta=1.0)


def test_a_loss_of_0_stays_within_reach():
  state = with_buffer(stripes([[1.0, 1.0, 1.0, 1.0]]))
  state, _ = method().weigh(state, drawn(0, 1, 2, 3), jnp.array([3.0, 0.0, 0.0, 40.0]))
  chances = replay.probabilities(state.buffer)[0]
  assert (np.asarray(chances) > 0).all()
  np.testing.assert_allclose(chances[1], 1e-6 / 43, rtol=1e-5)
  slots = replay.sample_by_priority(jax.random.key(0), state.buffer, 6, epsilon=1e3).slots  # As good as uniform.
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
    program = toys.jit(parallel.each_device(step, mesh, (spread, parallel.REPLICATED), (spread, each, each, each)))
    result = parallel.place(mesh, state)
    for seed in range(2):
      result, *rest = program(result, jax.random.key(seed))
    found.append(jax.device_get((result, rest)))
  for other in found[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), other, found[0])
