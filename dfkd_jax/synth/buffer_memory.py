"""Decides where a replay buffer's images are kept: in device memory or in host memory."""

import os
from collections.abc import Callable

import jax
import numpy as np

from dfkd_jax.messages import FieldError
from dfkd_jax.synth import replay
from dfkd_jax.types import Array, PyTree

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
  """Decides where the images are kept.

  Args:
    place: As configured: 'auto', 'device' or 'host'.
    limit: Bytes of a device; None: unknown, and taken to be enough.
    state: Everything that stays on the devices.
    synthesis: The method's part of it.
    compile_for_devices: Compiles the programs for images on the devices. Not called if the images
      alone are too many.

  Returns:
    These programs, or None if the images are kept on the host; and a note for the user. Raises a
    ValueError if the images neither fit on the devices nor may be kept on the host.
  """
  reason, buffer = device_only_reason(synthesis), replay.find_buffer(synthesis)
  if place == 'host':
    if reason:
      raise FieldError('buffer', f"buffer is 'host', must be 'auto' or 'device': {reason}.")
    return None, ''
  if place == 'device' or limit is None or buffer is None:
    return compile_for_devices(), ''
  needed, programs, free = _device_bytes(buffer.images), None, free_memory(limit, state)
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
  needed, available = 2 * int(np.prod(images.shape)), host_memory()
  if needed > available:
    raise FieldError('method.capacity', f'method.capacity needs {_format_size(needed)} of host '
                     'memory, as a checkpoint copies the images, must be so low that '
                     f'{_format_size(available)} suffice.')
  # The system allots no memory until something is written.
  return replay.replace_buffer(synthesis, images=np.zeros(images.shape, images.dtype))


def host_memory() -> int:
  """Returns the bytes of memory of this machine."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def _device_bytes(leaf: Array) -> int:
  """Bytes of the part of an array that one device holds."""
  sharding = getattr(leaf, 'sharding', None)
  shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
  return int(np.prod(shape)) * leaf.dtype.itemsize


def _format_size(number: int) -> str:
  return f'{number / 1e9:.1f} GB' if number >= 1e8 else f'{number / 1e6:.3g} MB'
