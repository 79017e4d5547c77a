"""Replay buffer of synthesised images: a ring of uint8 in device memory.

It is kept in as many stripes as there are tasks on all devices, each with its
own task's images, and a batch takes equally many from each. So one device with
four tasks and four devices with one task hold and draw the same.
"""

import jax
import jax.numpy as jnp
from flax import struct

from dfkd_jax import parallel
from dfkd_jax.types import Array, Batch, PRNGKey


class ReplayBuffer(struct.PyTreeNode):
  """The newest N images of each of this device's M tasks."""

  images: Array = parallel.sharded()  # [M, N, H, W, C] uint8
  labels: Array = parallel.sharded()  # [M, N] int32, the teacher's class, of the view it was synthesised by
  histogram: Array  # [K] int32, live images by class, over all tasks and devices
  next: Array  # [] int32, slot of each stripe that is written next
  size: Array  # [] int32, live slots of each stripe

  @property
  def capacity(self) -> int:
    """Slots of one stripe, N."""
    return self.images.shape[1]


def create(
    capacity: int, image_shape: tuple[int, int, int], num_classes: int, num_tasks: int = 1
) -> ReplayBuffer:
  """An empty buffer of `num_tasks` stripes with `capacity` slots each."""
  if capacity < 1:
    raise ValueError(f'capacity is {capacity}, must be at least 1.')
  return ReplayBuffer(
      images=jnp.zeros((num_tasks, capacity, *image_shape), jnp.uint8),
      labels=jnp.zeros((num_tasks, capacity), jnp.int32),
      histogram=jnp.zeros(num_classes, jnp.int32), next=jnp.int32(0), size=jnp.int32(0))


def to_uint8(images: Array) -> Array:
  """Images in [0, 1] as uint8, rounded down: the published buffer is a folder of PNGs written so."""
  return jnp.floor(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)


def to_float(images: Array) -> Array:
  """Images of uint8 as float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


def add(buffer: ReplayBuffer, images: Array, labels: Array, axis: str | None = None) -> ReplayBuffer:
  """Writes a batch into each stripe, over the oldest images where it is full.

  Args:
    buffer: The ring.
    images: [M, B, H, W, C] in [0, 1]; B at most the capacity.
    labels: [M, B] int32.
    axis: The mapped axis of devices, if any.
  """
  num = labels.shape[1]
  if num > buffer.capacity:
    raise ValueError(f'capacity is {buffer.capacity}, must be at least a batch of {num} images.')
  slots = (buffer.next + jnp.arange(num)) % buffer.capacity
  evicted = _count(buffer.labels[:, slots], jnp.broadcast_to(slots < buffer.size, labels.shape), buffer)
  added = _count(labels, jnp.ones(labels.shape, bool), buffer)
  return buffer.replace(
      images=buffer.images.at[:, slots].set(to_uint8(images), unique_indices=True),
      labels=buffer.labels.at[:, slots].set(labels, unique_indices=True),
      histogram=buffer.histogram + parallel.psum(added - evicted, axis),
      next=(buffer.next + num) % buffer.capacity,
      size=jnp.minimum(buffer.size + num, buffer.capacity))


def sample(key: PRNGKey, buffer: ReplayBuffer, batch_size: int, axis: str | None = None) -> Batch:
  """Draws images uniformly, with replacement, equally many from each stripe.

  The published loader shuffles the whole buffer and draws without replacement
  within a pass; drawing with replacement needs no order to be stored, and a run
  goes on exactly from its keys.

  Args:
    key: The same on all devices.
    buffer: Not empty.
    batch_size: On this device; a multiple of the number of stripes.
    axis: The mapped axis of devices, if any.
  """
  num_tasks = buffer.images.shape[0]
  share = parallel.even_share(batch_size, num_tasks, 'batch_size')
  keys = parallel.task_keys(key, num_tasks, axis)
  within = jax.vmap(lambda k: jax.random.randint(k, (share,), 0, jnp.maximum(buffer.size, 1), jnp.int32))(keys)
  slots = (within + buffer.capacity * jnp.arange(num_tasks)[:, None]).reshape(batch_size)
  flat = lambda a: a.reshape(num_tasks * buffer.capacity, *a.shape[2:])
  return Batch(to_float(flat(buffer.images)[slots]), flat(buffer.labels)[slots], slots)


def _count(labels: Array, counted: Array, buffer: ReplayBuffer) -> Array:
  return jnp.zeros_like(buffer.histogram).at[labels.reshape(-1)].add(counted.reshape(-1).astype(jnp.int32))
