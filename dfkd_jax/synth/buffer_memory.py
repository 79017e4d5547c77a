"""Decides where a replay buffer's images are kept: in device memory or in host memory."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dfkd_jax.messages import FieldError, check_choice
from dfkd_jax.synth import replay
from dfkd_jax.types import Array, PyTree

PLACES = ('auto', 'device', 'host')
SPARE = 0.05  # Of a device's memory, for fragments and small programs.


class Budget(NamedTuple):
  """Bytes of one device."""

  images: int  # of the buffer
  free: int  # beside the programs of a round
  limit: int  # of the device

  @property
  def fits(self) -> bool:
    """Whether the images may stay on the device."""
    return self.images <= self.free

  def __str__(self) -> str:
    free = _format_size(max(self.free, 0))
    return f'{_format_size(self.images)} a device, {free} free of {_format_size(self.limit)}'


def device_only_reason(place: str, synthesis: PyTree) -> str | None:
  """Says why a method's images cannot be kept in host memory; None if they can.

  Args:
    place: As configured, one of PLACES.
    synthesis: The method's state.

  Raises:
    ValueError: The place is unknown, or 'host' is not possible.
  """
  check_choice(place, PLACES, 'buffer')
  buffer, reason = replay.find_buffer(synthesis), None
  if buffer is None:
    reason = 'the method keeps no images'
  elif buffer.priorities is not None:
    reason = "the method draws images by priorities, which each of the student's steps changes"
  elif jax.process_count() > 1:
    reason = (f'there are {jax.process_count()} processes, and one alone would keep the images '
              'of all')
  if reason and place == 'host':
    raise FieldError('buffer', f"buffer is 'host', must be 'auto' or 'device': {reason}.")
  return reason


def budget(
    images: jax.ShapeDtypeStruct, limit: int, state: PyTree = None, programs: tuple = ()
) -> Budget:
  """Computes how much memory of a device is left for a buffer's images.

  Args:
    images: [M, N, H, W, C] with their sharding.
    limit: Bytes of a device.
    state: Other arrays that stay on the devices, or shapes with shardings. Images are not
      counted.
    programs: Compiled for the arguments in `state`; they run one at a time.
  """
  leaves = jax.tree.leaves(replay.replace_buffer(state, images=None))
  extra = max((_bytes_beside_arguments(program) for program in programs), default=0)
  free = int((1 - SPARE) * limit) - sum(_device_bytes(leaf) for leaf in leaves) - extra
  return Budget(_device_bytes(images), free, limit)


def choose_place(
    place: str, limit: int | None, state: PyTree, synthesis: PyTree,
    compile_for_devices: Callable[[], tuple],
) -> tuple[tuple | None, str]:
  """Decides where the images are kept.

  Args:
    place: As configured, one of PLACES.
    limit: Bytes of a device; None: unknown, and taken to be enough.
    state: Everything that stays on the devices.
    synthesis: The method's part of it.
    compile_for_devices: Compiles the programs for images on the devices. Not called if the images
      alone are too many.

  Returns:
    These programs, or None if the images are kept on the host; and a note for the user.

  Raises:
    ValueError: The images neither fit on the devices nor may be kept on the host.
  """
  reason = device_only_reason(place, synthesis)
  if place == 'host':
    return None, ''
  if place == 'device' or limit is None or replay.find_buffer(synthesis) is None:
    return compile_for_devices(), ''
  images, programs = replay.find_buffer(synthesis).images, None
  memory = budget(images, limit, state)
  if memory.fits:
    programs = compile_for_devices()
    memory = budget(images, limit, state, programs[:2])
  if reason and not memory.fits:
    raise FieldError('method.capacity', f'method.capacity must be lower: the image buffer is '
                     f'{memory}, and cannot be in host memory: {reason}. '
                     "buffer='device' tries nevertheless.")
  kept_in = 'device' if memory.fits else 'host'
  return programs if memory.fits else None, f'image buffer: {memory}: kept in {kept_in} memory'


def allocate_on_host(synthesis: PyTree) -> PyTree:
  """Allocates the buffer's images as zeros on the host, from their shape.

  Raises:
    ValueError: The host has less than twice the memory; a checkpoint copies the images.
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


def _bytes_beside_arguments(program: Any) -> int:
  sizes = program.memory_analysis()
  return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def _device_bytes(leaf: Array) -> int:
  """Bytes of the part of an array that one device holds."""
  sharding = getattr(leaf, 'sharding', None)
  shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
  return int(np.prod(shape)) * leaf.dtype.itemsize


def _format_size(number: int) -> str:
  return f'{number / 1e9:.1f} GB' if number >= 1e8 else f'{number / 1e6:.3g} MB'
