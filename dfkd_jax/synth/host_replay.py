"""Keeps a replay buffer's images in host memory, if device memory does not suffice.

400,000 images of 224 x 224 are 60 GB. Between the programs of a round they are a NumPy leaf of
the method's state, `buffer.images`, in the place of the array on the devices: a checkpoint reads
the same either way. The programs run without images. New images are copied out after each call
and written into the ring. The slots that the student's steps draw are known before the steps
begin, since draws are uniform, and the images of these slots are copied in, some steps at a time.
The same keys draw the same slots, so results are bit-equal wherever the images are kept.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dfkd_jax import parallel
from dfkd_jax.synth import replay
from dfkd_jax.types import PyTree

CHUNK = 2**30  # Bytes of images that are copied to a device at once.


def with_image_shapes(synthesis: PyTree, images: jax.ShapeDtypeStruct, mesh: Mesh) -> PyTree:
  """Sets only shape and sharding of a buffer's images, from [M, N, H, W, C] of one device."""
  shape = (mesh.size * images.shape[0], *images.shape[1:])
  sharding = NamedSharding(mesh, parallel.SPREAD)
  return replay.replace_buffer(
      synthesis, images=jax.ShapeDtypeStruct(shape, images.dtype, sharding=sharding))


def allocate(synthesis: PyTree) -> PyTree:
  """Allocates the buffer's images as zeros on the devices, unless they already exist."""
  buffer = replay.find_buffer(synthesis)
  if buffer is None or not isinstance(buffer.images, jax.ShapeDtypeStruct):
    return synthesis
  zeros = jax.jit(lambda: jnp.zeros(buffer.images.shape, buffer.images.dtype),
                  out_shardings=buffer.images.sharding)
  return replay.replace_buffer(synthesis, images=zeros())


def strip_images(synthesis: PyTree) -> PyTree:
  """Removes the buffer's images from a state, as the programs take it."""
  return replay.replace_buffer(synthesis, images=None, added=None, drawn=None)


def device_view(synthesis: PyTree) -> PyTree:
  """Removes the buffer's images if they are on the host."""
  buffer = replay.find_buffer(synthesis)
  is_on_host = buffer is not None and isinstance(buffer.images, np.ndarray)
  return strip_images(synthesis) if is_on_host else synthesis


def write(images: np.ndarray, added: np.ndarray, end: int) -> None:
  """Writes images [M, B, ...] into the ring [M, N, ...]; `end` is the slot after them."""
  num = added.shape[1]
  images[:, (end - num + np.arange(num)) % images.shape[1]] = added


def gather(images: np.ndarray, slots: np.ndarray) -> np.ndarray:
  """Collects the images [n, B, H, W, C] that the programs of all devices draw at slots [n, B].

  `images` [M, N, H, W, C] are the stripes of all devices. Each device counts slots from its own
  first stripe. A batch has equally many of each stripe, in order, so the position in the batch
  tells the stripe. The image of a slot of -1 is arbitrary.
  """
  num_tasks, capacity = images.shape[:2]
  within = (slots % capacity).reshape(len(slots), num_tasks, -1)
  gathered = np.empty((*within.shape, *images.shape[2:]), images.dtype)
  for task in range(num_tasks):
    np.take(images[task], within[:, task], axis=0, out=gathered[:, task], mode='clip')
  return gathered.reshape(*slots.shape, *images.shape[2:])


def steps_per_chunk(num_steps: int, bytes_a_step: int, limit: int | None = None) -> int:
  """Returns the most steps that divide `num_steps` and fit in `limit` (CHUNK) bytes; at least 1."""
  most = max(1, (CHUNK if limit is None else limit) // bytes_a_step)
  return max(n for n in range(1, num_steps + 1) if num_steps % n == 0 and n <= most)


def with_host_writes(synthesize: Callable) -> Callable:
  """Wraps (state, ...) -> (state, metrics) so that new images are copied into the host buffer."""

  def call(synthesis, *inputs):
    images = replay.find_buffer(synthesis).images
    synthesis, metrics = synthesize(strip_images(synthesis), *inputs)
    buffer = replay.find_buffer(synthesis)
    write(images, np.asarray(buffer.added), int(buffer.next))
    return replay.replace_buffer(strip_images(synthesis), images=images), metrics

  return call


def with_host_batches(
    sample_slots: Callable, steps: Callable, mesh: Mesh, num_steps: int, chunk: int) -> Callable:
  """Wraps the student's steps so that their images are copied from the host, chunk by chunk.

  `sample_slots` maps (state, key) to [num_steps, B]. `steps` maps (student, state, key, teacher,
  HostBatches of `chunk` steps) to (student, state, metrics). `chunk` divides `num_steps`.
  """
  sharding = NamedSharding(mesh, parallel.BATCHES)

  def call(student, synthesis, key, teacher):
    images, all_metrics = replay.find_buffer(synthesis).images, []
    synthesis = strip_images(synthesis)
    slots = np.asarray(sample_slots(synthesis, key))
    for first in range(0, num_steps, chunk):
      gathered = gather(images, slots[first:first + chunk])
      if len(all_metrics) > 1:
        jax.block_until_ready(all_metrics[-2])  # Keeps at most two chunks on their way.
      batches = replay.HostBatches(np.asarray(first, np.int32), jax.device_put(gathered, sharding))
      student, synthesis, metrics = steps(student, synthesis, key, teacher, batches)
      all_metrics.append(metrics)
    parts = {name: [metrics[name] for metrics in all_metrics] for name in all_metrics[0]}
    losses = np.concatenate(parts.pop('losses'))
    means = {name: np.mean(values) for name, values in parts.items()}
    return student, replay.replace_buffer(synthesis, images=images), means | {'losses': losses}

  return call


def with_host_sample(sample_slots: Callable, sample: Callable) -> Callable:
  """Wraps `sample` so that its images are copied from the host, if they are there.

  `sample_slots` maps (state, key) to [B]; `sample` takes (state, key, images [B, ...] | None, ...).
  """

  def call(synthesis, key, *inputs):
    stripped = device_view(synthesis)
    if stripped is synthesis:
      return sample(synthesis, key, None, *inputs)
    slots = np.asarray(sample_slots(stripped, jax.random.clone(key)))  # Same key: same slots.
    images = gather(replay.find_buffer(synthesis).images, slots[None])[0]
    return sample(stripped, key, images, *inputs)

  return call
