"""Keeps a replay buffer's images in host memory, if device memory does not suffice.

400,000 images of 224 x 224 are 60 GB. Between the programs of a round they are a NumPy leaf of
the method's state, `buffer.images`, in the place of the array on the devices: a checkpoint reads
the same either way. The programs run without images. New images are copied out after each call
and written into the ring. The slots that the student's steps draw are known before the steps
begin, since draws are uniform, and the images of these slots are copied in, some steps at a time.
The same keys draw the same slots, so results are bit-equal wherever the images are kept.
"""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dfkd_jax import parallel
from dfkd_jax.messages import FieldError
from dfkd_jax.synth import replay
from dfkd_jax.types import Array, PyTree

CHUNK = 2**30  # Bytes of images that are copied to a device at once.
SPARE = 0.05  # Of a device's memory, for fragments and small programs.


def device_only_reason(synthesis: PyTree) -> str | None:
  """Says why the images of a method's state cannot be kept in host memory; None if they can."""
  buffer, processes = replay.find_buffer(synthesis), jax.process_count()
  if buffer is None:
    return 'the method keeps no images'
  if buffer.priorities is not None:
    return "the method draws images by priorities, which each of the student's steps changes"
  if processes > 1:
    return f'there are {processes} processes, and one alone would keep the images of all'
  return None


def free_memory(limit: int, state: PyTree, programs: tuple = ()) -> int:
  """Computes how many of a device's `limit` bytes are left for a buffer's images.

  `state` has the arrays that stay on the devices, or shapes with shardings. Its buffer's images are
  not counted. `programs` are compiled for the arguments in `state`, and run one at a time.
  """
  kept = sum(map(_device_bytes, jax.tree.leaves(replay.replace_buffer(state, images=None))))
  sizes = [program.memory_analysis() for program in programs]
  extra = max((size.temp_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes
               for size in sizes), default=0)
  return int((1 - SPARE) * limit) - kept - extra


def choose_place(
    place: str, limit: int | None, state: PyTree, synthesis: PyTree,
    compile_for_devices: Callable[[], tuple]) -> tuple[tuple | None, str]:
  """Decides where the images are kept. Raises a ValueError if they fit nowhere.

  Args:
    place: As configured: 'auto', 'device' or 'host'.
    limit: Bytes of a device; None: unknown, and taken to be enough.
    state: Everything that stays on the devices; `synthesis` is the method's part.
    compile_for_devices: Compiles the programs for images on the devices. Not called if the images
      alone are too many.

  Returns:
    These programs, or None if the images are kept on the host; and a note for the user.
  """
  reason, buffer = device_only_reason(synthesis), replay.find_buffer(synthesis)
  if place == 'host':
    if reason:
      raise FieldError('buffer', f"buffer is 'host', must be 'auto' or 'device': {reason}.")
    return None, ''
  if place == 'device' or limit is None or buffer is None:
    return compile_for_devices(), ''
  needed, free = _device_bytes(buffer.images), free_memory(limit, state)
  if needed <= free:
    programs = compile_for_devices()
    free = free_memory(limit, state, programs[:2])
  memory = (f'{_format_size(needed)} a device, {_format_size(max(free, 0))} free of '
            f'{_format_size(limit)}')
  if needed <= free:
    return programs, f'image buffer: {memory}: kept in device memory'
  if reason:
    raise FieldError('method.capacity', f'method.capacity must be lower: the image buffer is '
                     f'{memory}, and cannot be in host memory: {reason}. '
                     "buffer='device' tries nevertheless.")
  return None, f'image buffer: {memory}: kept in host memory'


def allocate_on_host(synthesis: PyTree) -> PyTree:
  """Allocates the buffer's images as zeros on the host, from their shape.

  Raises a ValueError if the host has less than twice the memory: a checkpoint copies the images.
  """
  images = replay.find_buffer(synthesis).images
  needed = 2 * int(np.prod(images.shape))
  available = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if needed > available:
    raise FieldError('method.capacity', f'method.capacity needs {_format_size(needed)} of host '
                     'memory, as a checkpoint copies the images, must be so low that '
                     f'{_format_size(available)} suffice.')
  # The system allots no memory until something is written.
  return replay.replace_buffer(synthesis, images=np.zeros(images.shape, images.dtype))


def _device_bytes(leaf: Array) -> int:
  """Bytes of the part of an array that one device holds."""
  sharding = getattr(leaf, 'sharding', None)
  shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
  return int(np.prod(shape)) * leaf.dtype.itemsize


def _format_size(number: int) -> str:
  return f'{number / 1e9:.1f} GB' if number >= 1e8 else f'{number / 1e6:.3g} MB'


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


def steps_per_chunk(num_steps: int, bytes_a_step: int) -> int:
  """Returns the most steps that divide `num_steps` and fit in CHUNK bytes; at least 1."""
  most = max(1, CHUNK // bytes_a_step)
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
  HostBatches of `chunk` steps) to (student, state, metrics).
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
