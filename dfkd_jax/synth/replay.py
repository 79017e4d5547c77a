"""Replay buffer of synthesised images: a ring of uint8 in device memory.

It is kept in as many stripes as there are tasks on all devices, each with its
own task's images, and a batch takes equally many from each. So one device with
four tasks and four devices with one task hold and draw the same.

Where device memory does not suffice the images may be elsewhere: `images` is None then, whoever has them takes what
`add` leaves in `added`, and gives what `sample` asks for in `drawn`. All else stays and goes as it does with them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from dfkd_jax import parallel
from dfkd_jax.types import Array, Batch, PRNGKey, PyTree


class HostBatches(NamedTuple):
  """Some of a round's steps, each with its images."""

  first: Array  # [] int32, step of the round
  images: Array  # [n, B, H, W, C] uint8, of this step and those that follow, as `slots` found them


class ReplayBuffer(struct.PyTreeNode):
  """The newest N images of each of this device's M tasks."""

  images: Array | None = parallel.sharded()  # [M, N, H, W, C] uint8; None: they are elsewhere
  labels: Array = parallel.sharded()  # [M, N] int32, the teacher's class, of the view it was synthesised by
  priorities: Array | None = parallel.sharded()  # [M, N] float, see `live_priorities`; None: draws are uniform
  weights: Array | None = parallel.sharded()  # [M, N] float, of importance, above 0
  histogram: Array  # [K] int32, live images by class, over all tasks and devices
  next: Array  # [] int32, slot of each stripe that is written next
  size: Array  # [] int32, live slots of each stripe
  added: Array | None = parallel.sharded(default=None)  # [M, B, H, W, C] uint8, the last call's, to be taken elsewhere
  drawn: Array | None = parallel.sharded(default=None)  # [M, n, H, W, C] uint8, from elsewhere, for one `sample`

  @property
  def capacity(self) -> int:
    """Slots of one stripe, N."""
    return self.labels.shape[1]


def create(
    capacity: int, image_shape: tuple[int, int, int], num_classes: int, num_tasks: int = 1, *, prioritised: bool = False
) -> ReplayBuffer:
  """An empty buffer of `num_tasks` stripes with `capacity` slots each, with or without priorities."""
  if capacity < 1:
    raise ValueError(f'capacity is {capacity}, must be at least 1.')
  per_slot = lambda value: jnp.full((num_tasks, capacity), value, jnp.result_type(float)) if prioritised else None
  return ReplayBuffer(
      images=jnp.zeros((num_tasks, capacity, *image_shape), jnp.uint8),
      labels=jnp.zeros((num_tasks, capacity), jnp.int32),
      priorities=per_slot(0.0), weights=per_slot(1.0),
      histogram=jnp.zeros(num_classes, jnp.int32), next=jnp.int32(0), size=jnp.int32(0))


def find_buffer(state: PyTree) -> ReplayBuffer | None:
  """The one buffer in a method's state, or None."""
  found = [node for node in jax.tree.leaves(state, is_leaf=_is_buffer) if _is_buffer(node)]
  return found[0] if found else None


def replace_buffer(state: PyTree, **fields: Any) -> PyTree:
  """A method's state with other fields of its buffer."""
  return jax.tree.map(lambda node: node.replace(**fields) if _is_buffer(node) else node, state, is_leaf=_is_buffer)


def with_batch(state: PyTree, images: Array | None) -> PyTree:
  """A method's state whose next `sample` gives these images [B, H, W, C] uint8; None: as it is."""
  if images is None:
    return state
  num_tasks = find_buffer(state).labels.shape[0]
  return replace_buffer(state, drawn=images.reshape(num_tasks, -1, *images.shape[1:]))


def to_uint8(images: Array) -> Array:
  """Images in [0, 1] as uint8, rounded down: the published buffer is a folder of PNGs written so."""
  return jnp.floor(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)


def to_float(images: Array) -> Array:
  """Images of uint8 as float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


def add(
    buffer: ReplayBuffer, images: Array, labels: Array, axis: str | None = None, priorities: Array | None = None
) -> ReplayBuffer:
  """Writes a batch into each stripe, over the oldest images where it is full.

  Args:
    buffer: The ring.
    images: [M, B, H, W, C] in [0, 1]; B at most the capacity.
    labels: [M, B] int32.
    axis: The mapped axis of devices, if any.
    priorities: [M, B], of a buffer with priorities, see `live_priorities`; None: -1, as high as any. The weight of
      new images is 1.
  """
  num = labels.shape[1]
  if num > buffer.capacity:
    raise ValueError(f'capacity is {buffer.capacity}, must be at least a batch of {num} images.')
  slots = (buffer.next + jnp.arange(num)) % buffer.capacity
  evicted = _count(buffer.labels[:, slots], jnp.broadcast_to(slots < buffer.size, labels.shape), buffer)
  added = _count(labels, jnp.ones(labels.shape, bool), buffer)
  if buffer.priorities is not None:
    priorities = -1.0 if priorities is None else priorities.astype(buffer.priorities.dtype)
    buffer = buffer.replace(
        priorities=buffer.priorities.at[:, slots].set(priorities), weights=buffer.weights.at[:, slots].set(1.0))
  if buffer.images is None:
    buffer = buffer.replace(added=to_uint8(images))
  else:
    buffer = buffer.replace(images=buffer.images.at[:, slots].set(to_uint8(images), unique_indices=True))
  return buffer.replace(
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

  Returns:
    The batch; where the buffer's images are elsewhere they are those of `drawn`, or None without.
  """

  def uniform(keys, share):
    return jax.vmap(lambda k: jax.random.randint(k, (share,), 0, jnp.maximum(buffer.size, 1), jnp.int32))(keys)

  return _sample(key, buffer, batch_size, axis, uniform)


def live_priorities(buffer: ReplayBuffer) -> Array:
  """Priorities [M, N], none negative; 0 where no image is.

  One that is kept as -r is r of the stripe's highest at the time, or r while there is none: so images that have not
  been drawn yet are on the scale of the others, however large losses are when the first are known.
  """
  own = jnp.where(jnp.arange(buffer.capacity) < buffer.size, buffer.priorities, 0.0)
  highest = own.max(1, keepdims=True)
  return jnp.where(own < 0, -own * jnp.where(highest > 0, highest, 1.0), own)


def probabilities(buffer: ReplayBuffer, epsilon: float = 1e-6) -> Array:
  """P ∝ priority + epsilon within each stripe, [M, N]; 0 where no image is.

  Prioritised experience replay (arXiv:1511.05952, equation 1 with alpha 1): epsilon leaves nothing out of reach.
  """
  odds = jnp.where(jnp.arange(buffer.capacity) < buffer.size, live_priorities(buffer) + epsilon, 0.0)
  return odds / jnp.maximum(odds.sum(1, keepdims=True), jnp.finfo(odds.dtype).tiny)


def sample_by_priority(
    key: PRNGKey, buffer: ReplayBuffer, batch_size: int, epsilon: float = 1e-6, axis: str | None = None
) -> Batch:
  """Draws images by `probabilities`, with replacement, equally many from each stripe; else as `sample`.

  A chance below 2^-31 is rounded up to it, so that each live slot is within reach and no other is.
  """

  def by_priority(keys, share):
    # In integers, whose sums are exact: in float32 the rare are lost beside 1, or drawn for their neighbours.
    odds = jnp.ceil(2.0**31 * probabilities(buffer, epsilon)).astype(jnp.uint32)
    upper = jnp.cumsum(odds, axis=1, dtype=jnp.uint32)
    draws = jax.vmap(lambda k, u: jax.random.randint(k, (share,), 0, u[-1], jnp.uint32))(keys, upper)
    slots = jax.vmap(lambda u, d: jnp.searchsorted(u, d, side='right'))(upper, draws)
    return jnp.minimum(slots, buffer.capacity - 1).astype(jnp.int32)  # Of an empty buffer, as `sample`, anything.

  return _sample(key, buffer, batch_size, axis, by_priority)


def set_priorities(buffer: ReplayBuffer, slots: Array, priorities: Array) -> ReplayBuffer:
  """Writes priorities [B] at slots [B] as `Batch.slots` numbers them; of several at one slot the highest stays.

  What rounding has left below 0 becomes 0. A slot of -1 is nowhere, and nothing is written.
  """
  flat = buffer.priorities.reshape(-1)
  slots = _or_outside(slots, flat.size)
  # Whatever the order in which a device writes duplicates, the result is the same.
  flat = flat.at[slots].set(0.0, mode='drop').at[slots].max(priorities.astype(flat.dtype), mode='drop')
  return buffer.replace(priorities=flat.reshape(buffer.priorities.shape))


def weights_at(buffer: ReplayBuffer, slots: Array) -> Array:
  """Importance weights [B] as they were last set, at slots [B]; 1 of what is from nowhere, -1."""
  return jnp.where(slots < 0, 1.0, buffer.weights.reshape(-1)[slots])


def set_weights(buffer: ReplayBuffer, slots: Array, weights: Array) -> ReplayBuffer:
  """Writes importance weights [B] at slots [B], but for -1; several at one slot must be the same."""
  flat = buffer.weights.reshape(-1)
  flat = flat.at[_or_outside(slots, flat.size)].set(weights.astype(flat.dtype), mode='drop')
  return buffer.replace(weights=flat.reshape(buffer.weights.shape))


def importance_weights(
    buffer: ReplayBuffer, slots: Array, beta: float | Array, epsilon: float = 1e-6
) -> Array:
  """(N P)^-beta [B] at slots [B], with N the images of a stripe (arXiv:1511.05952, section 3.4, not normalised)."""
  chances = probabilities(buffer, epsilon).reshape(-1)[slots]
  # A slot that was drawn is live, and its chance above 0; the guard is for an empty buffer.
  return jnp.maximum(buffer.size * chances, jnp.finfo(chances.dtype).tiny) ** -beta


def _sample(key: PRNGKey, buffer: ReplayBuffer, batch_size: int, axis: str | None, draw) -> Batch:
  """A batch of what `draw: (keys [M], share) -> slots [M, share]` picks."""
  num_tasks = buffer.labels.shape[0]
  share = parallel.even_share(batch_size, num_tasks, 'batch_size')
  within = draw(parallel.task_keys(key, num_tasks, axis), share)
  slots = (within + buffer.capacity * jnp.arange(num_tasks)[:, None]).reshape(batch_size)
  flat = lambda a: a.reshape(num_tasks * buffer.capacity, *a.shape[2:])
  labels = flat(buffer.labels)[slots]
  if buffer.images is not None:
    images = flat(buffer.images)[slots]
  elif buffer.drawn is not None:  # What comes of no slot is behind what does, see `generative.beside`.
    images = buffer.drawn[:, :share].reshape(batch_size, *buffer.drawn.shape[2:])
  else:
    return Batch(None, labels, slots)
  # Wherever they come from, a program goes on with them in the same way: results are the same, bit for bit.
  return Batch(to_float(jax.lax.optimization_barrier(images)), labels, slots)


def _is_buffer(node: Any) -> bool:
  return isinstance(node, ReplayBuffer)


def _or_outside(slots: Array, size: int) -> Array:
  """Slots, with one beyond the last for -1, which JAX would take for the last itself."""
  return jnp.where(slots < 0, size, slots)


def _count(labels: Array, counted: Array, buffer: ReplayBuffer) -> Array:
  return jnp.zeros_like(buffer.histogram).at[labels.reshape(-1)].add(counted.reshape(-1).astype(jnp.int32))
