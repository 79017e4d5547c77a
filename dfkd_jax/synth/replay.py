"""Replay buffer of synthesised images: a ring of uint8 in device memory.

It has as many stripes as there are tasks on all devices, each with the images of one task, and a
batch takes equally many from each. So one device with four tasks and four devices with one task
hold and draw the same.

If the buffer is kept on the host, `images` is None. The caller copies `added` out after `add`,
and sets `drawn` before `sample`; see `host_replay`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from dfkd_jax import parallel
from dfkd_jax.messages import FieldError
from dfkd_jax.types import Array, Batch, PRNGKey, PyTree


class ReplayBuffer(struct.PyTreeNode):
  """The newest N images of each of this device's M tasks."""

  images: Array | None = parallel.sharded()  # [M, N, H, W, C] uint8; None: on the host
  labels: Array = parallel.sharded()  # [M, N] int32, the teacher's class in the augmented view
  priorities: Array | None = parallel.sharded()  # [M, N] float, see synth/priorities.py, or None
  weights: Array | None = parallel.sharded()  # [M, N] float, of importance, above 0
  histogram: Array  # [K] int32, live images by class, over all tasks and devices
  next: Array  # [] int32, slot of each stripe that is written next
  size: Array  # [] int32, live slots of each stripe
  added: Array | None = parallel.sharded(default=None)  # [M, B, H, W, C] uint8, to be copied out
  drawn: Array | None = parallel.sharded(default=None)  # [M, n, H, W, C] uint8, for one `sample`

  @property
  def capacity(self) -> int:
    """Slots of one stripe, N."""
    return self.labels.shape[1]


class HostBatches(NamedTuple):
  """The images of some of the student's steps, from the host."""

  first: Array  # [] int32, the first of these steps
  images: Array  # [n, B, H, W, C] uint8


def create(
    capacity: int, image_shape: tuple[int, int, int], num_classes: int, num_tasks: int = 1, *,
    prioritised: bool = False) -> ReplayBuffer:
  """Makes an empty buffer of `num_tasks` stripes with `capacity` slots each."""
  if capacity < 1:
    raise FieldError('capacity', f'capacity is {capacity}, must be at least 1.')
  slots = (num_tasks, capacity)
  return ReplayBuffer(
      images=jnp.zeros((*slots, *image_shape), jnp.uint8), labels=jnp.zeros(slots, jnp.int32),
      priorities=jnp.zeros(slots, jnp.result_type(float)) if prioritised else None,
      weights=jnp.ones(slots, jnp.result_type(float)) if prioritised else None,
      histogram=jnp.zeros(num_classes, jnp.int32), next=jnp.int32(0), size=jnp.int32(0))


def find_buffer(state: PyTree) -> ReplayBuffer | None:
  """Returns the one buffer in a method's state, or None."""
  return next(filter(_is_buffer, jax.tree.leaves(state, is_leaf=_is_buffer)), None)


def replace_buffer(state: PyTree, **fields: Any) -> PyTree:
  """Returns a method's state with other fields of its buffer."""
  replace = lambda node: node.replace(**fields) if _is_buffer(node) else node
  return jax.tree.map(replace, state, is_leaf=_is_buffer)


def with_batch(state: PyTree, images: Array | None) -> PyTree:
  """Sets the images [B, H, W, C] uint8 that the next `sample` returns, unless they are None."""
  if images is None:
    return state
  num_tasks = find_buffer(state).labels.shape[0]
  return replace_buffer(state, drawn=images.reshape(num_tasks, -1, *images.shape[1:]))


def to_uint8(images: Array) -> Array:
  """Rounds images in [0, 1] down to uint8, as the published buffer, a folder of PNGs."""
  return jnp.floor(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)


def to_float(images: Array) -> Array:
  """Converts uint8 images to float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


def unsaved(images: Array, labels: Array) -> Batch:
  """Returns a batch of images [M, B, H, W, C] that are in no slot, rounded as in the buffer."""
  images = to_float(to_uint8(images.reshape(-1, *images.shape[2:])))
  return Batch(images, labels.reshape(-1), jnp.full(images.shape[0], -1, jnp.int32))


def add(
    buffer: ReplayBuffer, images: Array, labels: Array, axis: str | None = None,
    priorities: Array | None = None) -> ReplayBuffer:
  """Writes a batch into each stripe, over the oldest images where it is full.

  Images are [M, B, H, W, C] in [0, 1], with B at most the capacity, and labels [M, B] int32.
  Priorities are [M, B], see `priorities.live_priorities`; None: -1, as high as any. The weight of
  new images is 1. `axis` is the mapped axis of devices, if any.
  """
  num = labels.shape[1]
  if num > buffer.capacity:
    raise FieldError('capacity', f'capacity is {buffer.capacity}, must be at least a batch of '
                     f'{num} images.')
  slots = (buffer.next + jnp.arange(num)) % buffer.capacity
  was_live = jnp.broadcast_to(slots < buffer.size, labels.shape)

  def count(labels, is_counted):
    counts = is_counted.reshape(-1).astype(jnp.int32)
    return jnp.zeros_like(buffer.histogram).at[labels.reshape(-1)].add(counts)

  evicted = count(buffer.labels[:, slots], was_live)
  added = count(labels, jnp.ones(labels.shape, bool))
  changes = {}
  if buffer.priorities is not None:
    priorities = -1.0 if priorities is None else priorities.astype(buffer.priorities.dtype)
    changes['priorities'] = buffer.priorities.at[:, slots].set(priorities)
    changes['weights'] = buffer.weights.at[:, slots].set(1.0)
  images = to_uint8(images)
  if buffer.images is None:
    changes['added'] = images
  else:
    changes['images'] = buffer.images.at[:, slots].set(images, unique_indices=True)
  return buffer.replace(
      labels=buffer.labels.at[:, slots].set(labels, unique_indices=True),
      histogram=buffer.histogram + parallel.psum(added - evicted, axis),
      next=(buffer.next + num) % buffer.capacity,
      size=jnp.minimum(buffer.size + num, buffer.capacity), **changes)


def sample(key: PRNGKey, buffer: ReplayBuffer, batch_size: int, axis: str | None = None) -> Batch:
  """Draws images uniformly, equally many from each stripe; see `sample_slots`.

  The published loader draws without replacement within a pass. Drawing with replacement needs no
  order to be stored, and resumes exactly from the keys.
  """

  def draw_slots(keys, share):
    size = jnp.maximum(buffer.size, 1)
    return jax.vmap(lambda k: jax.random.randint(k, (share,), 0, size, jnp.int32))(keys)

  return sample_slots(key, buffer, batch_size, axis, draw_slots)


def sample_slots(
    key: PRNGKey, buffer: ReplayBuffer, batch_size: int, axis: str | None,
    draw_slots: Callable[[Array, int], Array]) -> Batch:
  """Returns the batch at the slots that `draw_slots` picks.

  The key is the same on all devices, and the buffer not empty. `batch_size` counts on this device;
  a multiple of the number of stripes. `draw_slots` maps (keys [M], number) to slots [M, number]
  within each stripe. If the buffer is on the host, the batch has the images `drawn`, or None.
  """
  num_tasks = buffer.labels.shape[0]
  share = parallel.even_share(batch_size, num_tasks, 'batch_size')
  within = draw_slots(parallel.task_keys(key, num_tasks, axis), share)
  slots = (within + buffer.capacity * jnp.arange(num_tasks)[:, None]).reshape(batch_size)
  flatten = lambda array: array.reshape(num_tasks * buffer.capacity, *array.shape[2:])
  labels = flatten(buffer.labels)[slots]
  if buffer.images is not None:
    images = flatten(buffer.images)[slots]
  elif buffer.drawn is not None:
    # Images of a moving average follow those of the buffer, see `moving_average.append_images`.
    images = buffer.drawn[:, :share].reshape(batch_size, *buffer.drawn.shape[2:])
  else:
    return Batch(None, labels, slots)
  # The barrier makes results bit-equal wherever the images are kept.
  return Batch(to_float(jax.lax.optimization_barrier(images)), labels, slots)


def _is_buffer(node: Any) -> bool:
  return isinstance(node, ReplayBuffer)
