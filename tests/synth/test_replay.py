"""The replay buffer against a list of Python's: what is kept, counted and drawn."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from buffers import SHAPE, K, batch, program
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_jax.synth import replay


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 5]), max_size=12), st.sampled_from([5, 7]),
    st.sampled_from([1, 3]))
def test_any_pushes_leave_the_newest_and_an_exact_histogram(sizes, capacity, num_tasks):
  buffer = replay.create(capacity, SHAPE, K, num_tasks)
  kept = [[] for _ in range(num_tasks)]
  for index, num in enumerate(sizes):
    images, labels = batch(index, num_tasks, num)
    buffer = program(num)(buffer, images, labels)
    for task in range(num_tasks):
      pushed = zip(np.floor(np.asarray(images[task]) * 255), np.asarray(labels[task]), strict=True)
      kept[task] = (kept[task] + list(pushed))[-capacity:]
  size, written = int(buffer.size), sum(sizes)
  assert size == min(written, capacity)
  assert int(buffer.next) == written % capacity
  recount = np.bincount([label for task in kept for _, label in task], minlength=K)
  np.testing.assert_array_equal(buffer.histogram, recount)
  np.testing.assert_array_equal(
      np.bincount(np.asarray(buffer.labels[:, :size]).ravel(), minlength=K), recount)
  for task in range(num_tasks):
    oldest_first = (np.arange(size) + (written if written > capacity else 0)) % capacity
    for slot, (image, label) in zip(oldest_first, kept[task], strict=True):
      np.testing.assert_array_equal(buffer.images[task, slot], image)
      assert int(buffer.labels[task, slot]) == label


def test_a_full_ring_drops_the_oldest():
  buffer = replay.create(3, SHAPE, K)
  for label in (0, 1, 2):
    buffer = replay.add(buffer, jnp.full((1, 2, *SHAPE), label / 10), jnp.full((1, 2), label))
  # By slot: 0 0 -, then 1 0 1, then 1 2 2.
  np.testing.assert_array_equal(buffer.labels, [[1, 2, 2]])
  np.testing.assert_array_equal(buffer.histogram, [0, 1, 2, 0])
  assert buffer.capacity == 3


def test_a_batch_as_large_as_the_ring_replaces_all():
  buffer = replay.create(3, SHAPE, K)
  for label in (1, 3):
    buffer = replay.add(buffer, jnp.zeros((1, 3, *SHAPE)), jnp.full((1, 3), label))
  np.testing.assert_array_equal(buffer.histogram, [0, 0, 0, 3])


def test_images_are_rounded_down():
  values = jnp.array([0.0, 0.999 / 255, 1 / 255 + 1e-4, 254.999 / 255, 1.0, -0.5, 1.5])
  np.testing.assert_array_equal(replay.to_uint8(values), [0, 0, 1, 254, 255, 0, 255])
  assert replay.to_uint8(values).dtype == jnp.uint8


def test_what_was_stored_comes_back_from_the_buffer_exactly():
  levels = jnp.arange(256, dtype=jnp.uint8)
  floats = replay.to_float(levels)
  assert floats.dtype == jnp.float32
  np.testing.assert_allclose(floats, np.arange(256) / 255, rtol=1e-7)
  drawn = jax.random.uniform(jax.random.key(0), (5000,))
  lost = drawn - replay.to_float(replay.to_uint8(drawn))
  assert float(lost.min()) > -1e-6
  assert float(lost.max()) < 1 / 255 + 1e-6


def filled(num_tasks, capacity, num):
  buffer = replay.create(capacity, SHAPE, K, num_tasks)
  return replay.add(buffer, *batch(0, num_tasks, num))


def test_samples_are_what_the_slots_hold():
  buffer = filled(num_tasks=3, capacity=8, num=5)
  drawn = replay.sample(jax.random.key(1), buffer, 12)
  assert drawn.images.shape == (12, *SHAPE)
  assert (drawn.images.dtype, drawn.labels.dtype) == (jnp.float32, jnp.int32)
  stripe, slot = np.divmod(np.asarray(drawn.slots), 8)
  np.testing.assert_array_equal(stripe, np.repeat([0, 1, 2], 4))  # Equally many from each task.
  np.testing.assert_array_equal(drawn.labels, np.asarray(buffer.labels)[stripe, slot])
  np.testing.assert_allclose(drawn.images, np.asarray(buffer.images)[stripe, slot] / 255, rtol=1e-6)


def test_only_live_slots_are_drawn_and_each_as_often():
  buffer = filled(num_tasks=2, capacity=50, num=6)
  sample = jax.jit(lambda key: replay.sample(key, buffer, 120).slots)
  slots = np.concatenate([sample(jax.random.key(seed)) for seed in range(20)])
  stripe, slot = np.divmod(slots, 50)
  counts = np.zeros((2, 50))
  np.add.at(counts, (stripe, slot), 1)
  assert counts[:, 6:].sum() == 0
  expected = 20 * 60 / 6
  for of_stripe in counts[:, :6]:
    # Chi-square with 5 degrees, p = 0.001.
    assert ((of_stripe - expected) ** 2 / expected).sum() < 20.5
  assert not np.array_equal(slot[stripe == 0], slot[stripe == 1])


def test_a_full_ring_is_drawn_from_whole():
  buffer = replay.add(filled(num_tasks=1, capacity=6, num=5), *batch(1, 1, 5))
  slots = np.asarray(replay.sample(jax.random.key(0), buffer, 300).slots)
  assert set(slots.tolist()) == set(range(6))


def test_the_key_decides():
  buffer = filled(num_tasks=1, capacity=9, num=5)
  draw = lambda seed: np.asarray(replay.sample(jax.random.key(seed), buffer, 40).slots)
  np.testing.assert_array_equal(draw(0), draw(0))
  assert not np.array_equal(draw(0), draw(1))


def test_errors_name_what_is_wrong():
  with pytest.raises(ValueError, match='capacity is 0, must be at least 1'):
    replay.create(0, SHAPE, K)
  with pytest.raises(ValueError, match='capacity is 4, must be at least a batch of 5 images'):
    filled(num_tasks=1, capacity=4, num=5)
  with pytest.raises(
      ValueError, match=r'batch_size is 7, must be a positive multiple of 3 .*such as 6'):
    replay.sample(jax.random.key(0), filled(num_tasks=3, capacity=5, num=5), 7)
