"""Priorities in the buffer, draws by them, and importance weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from buffers import SHAPE, K, batch, program, stripes
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_jax.synth import priorities as priority
from dfkd_jax.synth import replay


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 5]), st.booleans()), max_size=9),
       st.sampled_from([5, 7]), st.sampled_from([1, 3]))
def test_any_pushes_and_updates_leave_an_exact_histogram_and_the_priorities_given(
    pushes, capacity, num_tasks):
  """Against arrays of NumPy; after a push all that is live gets other priorities and weights."""
  buffer = replay.create(capacity, SHAPE, K, num_tasks, prioritised=True)
  labels, priorities = np.full((num_tasks, capacity), -1), np.zeros((num_tasks, capacity))
  weights, written = np.ones((num_tasks, capacity)), 0
  for index, (num, given_priorities) in enumerate(pushes):
    images, new = batch(index, num_tasks, num)
    own = np.linspace(0.1, 0.9, num_tasks * num, dtype=np.float32).reshape(num_tasks, num) + index
    buffer = program(num)(
        buffer, images, new, priorities=jnp.asarray(own) if given_priorities else None)
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
  added = replay.add(buffer, *batch(0, 2, 3), priorities=jnp.ones((2, 3)))
  assert (added.priorities, added.weights) == (None, None)
  assert jax.tree.structure(added) == jax.tree.structure(buffer)


@pytest.mark.parametrize('in_float64', [False, True])
def test_the_state_keeps_its_types(in_float64):
  """Also where losses and modulations come in another float type."""
  buffer = replay.create(5, SHAPE, K, 2, prioritised=True)
  with jax.enable_x64(in_float64):
    values = jnp.asarray([0.5, 1.5], jnp.result_type(float))
    after = replay.add(buffer, *batch(0, 2, 3), priorities=jnp.ones((2, 3)))
    after = priority.set_priorities(after, jnp.array([0, 6]), values)
    after = priority.set_weights(after, jnp.array([0, 6]), values)
  typed = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)
  assert typed(after) == typed(buffer)


def test_live_priorities_are_0_where_no_image_is():
  buffer = stripes([[1.0, 2.0, 3.0], [4.0, 5.0, -6.0]], size=2)
  np.testing.assert_array_equal(priority.live_priorities(buffer), [[1, 2, 0], [4, 5, 0]])


@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e6])
def test_what_is_new_is_on_the_scale_of_what_has_been_drawn(scale):
  """Whatever the losses turn out to be, and in each stripe by itself."""
  buffer = stripes([[-1.0, -0.25, 3 * scale, scale, 99.0], [-1.0, -0.5, -0.5, 0.0, 99.0]], size=4)
  np.testing.assert_allclose(
      priority.live_priorities(buffer),
      [[3 * scale, 0.75 * scale, 3 * scale, scale, 0], [1, 0.5, 0.5, 0, 0]], rtol=1e-6)
  after = priority.set_priorities(buffer, jnp.array([5, 1]), jnp.array([8 * scale, 5 * scale]))
  np.testing.assert_allclose(
      priority.live_priorities(after), scale * np.array([[5, 5, 3, 1, 0], [8, 4, 4, 0, 0]]),
      rtol=1e-6)


def test_probabilities_by_hand():
  """Each stripe for itself; what lies in dead slots counts nothing."""
  found = priority.probabilities(
      stripes([[3.0, 0.0, 1.0, 99.0], [0.0, 0.0, 0.0, 99.0]], size=3), epsilon=0.5)
  np.testing.assert_allclose(
      found, [[3.5 / 5.5, 0.5 / 5.5, 1.5 / 5.5, 0], [1 / 3, 1 / 3, 1 / 3, 0]], rtol=1e-6)


def test_an_empty_buffer_has_no_probabilities_and_finite_weights():
  buffer = replay.create(4, SHAPE, K, prioritised=True)
  np.testing.assert_array_equal(priority.probabilities(buffer), np.zeros((1, 4)))
  assert np.isfinite(priority.importance_weights(buffer, jnp.arange(4), 0.5)).all()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1e4), min_size=7, max_size=7), st.integers(1, 7))
def test_probabilities_sum_to_1_and_weights_take_the_bias_back(priorities, size):
  """E_P[1 / (N P)] = 1, where beta is 1; nothing live is out of reach."""
  buffer = stripes([priorities], size)
  chances = np.asarray(priority.probabilities(buffer), np.float64)[0]
  np.testing.assert_allclose(chances.sum(), 1, rtol=1e-6)
  assert (chances[:size] > 0).all()
  weights = priority.importance_weights(buffer, jnp.arange(size), 1.0)
  np.testing.assert_allclose((chances[:size] * weights).sum(), 1, rtol=1e-5)


def test_importance_weights_by_hand():
  """N is the images of a stripe, so equal priorities weigh 1 for any number of stripes."""
  buffer = stripes([[6.0, 1.0, 1.0, 7.0, 0.0], [2.0, 2.0, 2.0, 2.0, 0.0]], size=4)
  found = priority.importance_weights(buffer, jnp.array([3, 0, 2, 6]), 0.5, epsilon=1e-7)
  np.testing.assert_allclose(
      found, [(28 / 15) ** -0.5, (24 / 15) ** -0.5, (4 / 15) ** -0.5, 1], rtol=1e-5)
  np.testing.assert_array_equal(priority.importance_weights(buffer, jnp.arange(4), 0.0), np.ones(4))


def test_draws_follow_the_probabilities():
  """Chi-square in each of three stripes: seven slots of eleven are live, one has priority 0."""
  priorities = np.zeros((3, 11))
  priorities[0, :7] = [5, 0, 1, 2, 0.5, 3, 1]
  priorities[1, :7] = [0, 1, 1, 1, 1, 1, 20]
  priorities[2, :7] = [9, 8, 7, 6, 5, 4, 0]
  priorities[:, 7:] = 50  # Of no image.
  buffer, share = stripes(priorities, size=7), 30_000
  drawn = toys.jit(lambda key: priority.sample_by_priority(key, buffer, 3 * share, epsilon=0.05))(
      jax.random.key(0))
  stripe, slot = np.divmod(np.asarray(drawn.slots), 11)
  np.testing.assert_array_equal(stripe, np.repeat([0, 1, 2], share))
  for index in range(3):
    counts = np.bincount(slot[stripe == index], minlength=11)
    odds = priorities[index, :7] + 0.05
    expected = share * odds / odds.sum()
    assert counts[7:].sum() == 0
    # Six degrees of freedom, p = 0.001.
    assert ((counts[:7] - expected) ** 2 / expected).sum() < 22.5
  assert not np.array_equal(slot[stripe == 0], slot[stripe == 1])


def test_draws_are_what_the_slots_hold():
  buffer = stripes(np.arange(15.0).reshape(3, 5))
  drawn = priority.sample_by_priority(jax.random.key(1), buffer, 12)
  assert drawn.images.shape == (12, *SHAPE)
  assert (drawn.images.dtype, drawn.labels.dtype, drawn.slots.dtype) == (
      jnp.float32, jnp.int32, jnp.int32)
  np.testing.assert_array_equal(np.asarray(drawn.slots) // 5, np.repeat([0, 1, 2], 4))
  np.testing.assert_allclose(drawn.images[:, 2, 1, 0], np.asarray(drawn.slots) / 255, rtol=1e-6)
  np.testing.assert_array_equal(drawn.labels, drawn.slots % K)


@pytest.mark.parametrize('size', [1, 3, 6])
def test_equal_priorities_are_drawn_whole_and_nothing_else(size):
  buffer = stripes(np.full((2, 6), 2.0), size)
  slots = np.asarray(priority.sample_by_priority(jax.random.key(0), buffer, 400).slots)
  assert set((slots % 6).tolist()) == set(range(size))


def test_after_the_ring_has_gone_round_what_is_old_is_drawn_no_more():
  buffer = replay.create(6, SHAPE, K, prioritised=True)
  for index in range(3):
    buffer = replay.add(buffer, jnp.full((1, 4, *SHAPE), (index + 1) / 8), jnp.full((1, 4), index))
  drawn = priority.sample_by_priority(jax.random.key(0), buffer, 300)
  assert set(np.asarray(drawn.labels).tolist()) == {1, 2}
  np.testing.assert_array_equal(np.round(drawn.images[:, 0, 0, 0] * 8), drawn.labels + 1)


def test_the_many_that_are_rare_are_all_within_reach():
  """A tail of 4,999 slots with a chance of 4e-8 each; float32 sums would reach one in six."""
  priorities = np.full((1, 5_000), 4e-8)
  priorities[0, 0] = 1 - priorities[0, 1:].sum()
  images = jnp.zeros((1, 5_000, 1, 1, 1), jnp.uint8)
  buffer = replay.create(5_000, (1, 1, 1), K, prioritised=True).replace(
      images=images, priorities=jnp.asarray(priorities, jnp.float32), size=jnp.int32(5_000))
  draw = jax.jit(
      lambda key: priority.sample_by_priority(key, buffer, 1_000_000, epsilon=1e-12).slots)
  tail = np.concatenate([
      slots[slots > 0] for slots in (np.asarray(draw(jax.random.key(seed))) for seed in range(3))])
  assert abs(len(tail) - 600) < 4 * 600**0.5
  distinct = 4_999 * (1 - np.exp(-len(tail) / 4_999))
  assert abs(len(set(tail.tolist())) - distinct) < 4 * (len(tail) - distinct) ** 0.5
  assert (tail == 4_999).sum() < 4  # The last takes no rounding on itself.


def test_only_what_was_drawn_changes_and_duplicates_leave_the_highest():
  buffer = stripes([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
  after = priority.set_priorities(
      buffer, jnp.array([4, 1, 4, 4, 0]), jnp.array([0.5, 9.0, 0.75, 0.25, -1e-7]))
  np.testing.assert_array_equal(after.priorities, [[0, 9, 3], [4, 0.75, 6]])
  after = priority.set_weights(buffer, jnp.array([4, 1, 4]), jnp.array([0.5, 9.0, 0.5]))
  np.testing.assert_array_equal(after.weights, [[1, 9, 1], [1, 0.5, 1]])
  np.testing.assert_array_equal(priority.weights_at(after, jnp.array([1, 5, 4])), [9, 1, 0.5])
