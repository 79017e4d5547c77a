"""A replay buffer's images in host memory, where that of the devices does not suffice.

400,000 images of 224 x 224 are 60 GB. Between the programs of a round they are a NumPy leaf of the method's state,
`buffer.images`, as they would else be an array on the devices: a checkpoint reads the same either way. The programs
run without. What a call adds is fetched and written into the ring; which slots the student's steps will draw is known
before they begin, since draws are uniform, and the images of these slots are handed in, some steps at a time. The same
keys draw the same slots, so a run computes the same, bit for bit, wherever the images lie.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dfkd_jax import parallel
from dfkd_jax.messages import check_choice
from dfkd_jax.synth import replay
from dfkd_jax.types import Array, Metrics, PyTree

PLACES = ('auto', 'device', 'host')
_PLACE_OF = {True: 'device', False: 'host'}  # By whether it fits.
CHUNK = 2**30  # Bytes of images that are handed to a device at once; while it works on them, the next may come.
SPARE = 0.05  # Of a device's memory, for what no program's analysis counts: fragments, other small programs.


class Budget(NamedTuple):
  """Bytes of one device."""

  images: int  # of the buffer
  free: int  # beside what the programs of a round need
  limit: int  # of the device

  @property
  def fits(self) -> bool:
    """Whether the images may stay on the device."""
    return self.images <= self.free

  def __str__(self) -> str:
    return f'{_size(self.images)} a device, {_size(max(self.free, 0))} free of {_size(self.limit)}'


def device_only_reason(place: str, synthesis: PyTree) -> str | None:
  """Why a method's images cannot lie in host memory; None if they can.

  Args:
    place: As wanted, one of PLACES.
    synthesis: The method's state.

  Raises:
    ValueError: It is no place, or the host is wanted by a run that cannot have its images there.
  """
  check_choice(place, PLACES, 'buffer')
  buffer, reason = replay.find_buffer(synthesis), None
  if buffer is None:
    reason = 'the method keeps no images'
  elif buffer.priorities is not None:
    reason = "the method draws images by priorities, which the student's every step changes"
  elif jax.process_count() > 1:
    reason = f'there are {jax.process_count()} processes, and one alone would keep the images of all'
  if reason and place == 'host':
    raise ValueError(f"buffer is 'host', must be 'auto' or 'device': {reason}.")
  return reason


def budget(images: jax.ShapeDtypeStruct, limit: int, state: PyTree = None, programs: tuple = ()) -> Budget:
  """What is left of a device for a buffer's images.

  Args:
    images: [M, N, H, W, C] with their place.
    limit: Bytes of a device.
    state: All else that stays on the devices: arrays, or shapes with their places; images are passed over.
    programs: Compiled, for arguments that `state` has, and images on the devices; they run one at a time.
  """
  stays = sum(_bytes(leaf) for leaf in jax.tree.leaves(replay.replace_buffer(state, images=None)))
  free = int((1 - SPARE) * limit) - stays - max((_beside_arguments(program) for program in programs), default=0)
  return Budget(_bytes(images), free, limit)


def choose_place(
    place: str, limit: int | None, state: PyTree, synthesis: PyTree, compiled: Callable[[], tuple]
) -> tuple[tuple | None, str]:
  """The programs for images on the devices, or None if they are to be on the host; and what is to be said of it.

  Args:
    place: As wanted, one of PLACES.
    limit: Bytes of a device; None: not known, and taken to be enough.
    state: All that stays on the devices.
    synthesis: The method's part of it.
    compiled: Makes the programs for images on the devices; not called where the images alone are too many.

  Raises:
    ValueError: The images do not fit on the devices, and cannot be elsewhere; or as `bound_to_devices` says.
  """
  bound = device_only_reason(place, synthesis)
  if place == 'host':
    return None, ''
  if place == 'device' or limit is None or replay.find_buffer(synthesis) is None:
    return compiled(), ''
  images, programs = replay.find_buffer(synthesis).images, None
  found = budget(images, limit, state)
  if found.fits:
    programs = compiled()
    found = budget(images, limit, state, programs[:2])
  if bound and not found.fits:
    raise ValueError(
        f'method.capacity must be lower: the image buffer is {found}, and cannot be in host memory, as {bound}; '
        "buffer='device' tries nevertheless.")
  return programs if found.fits else None, f'image buffer: {found}: kept in {_PLACE_OF[found.fits]} memory'


def _beside_arguments(program: Any) -> int:
  sizes = program.memory_analysis()
  return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def _bytes(leaf: Array) -> int:
  """Of what one device has of an array."""
  shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, 'sharding', None) else leaf.shape
  return int(np.prod(shape)) * leaf.dtype.itemsize


def _size(number: int) -> str:
  return f'{number / 1e9:.1f} GB' if number >= 1e8 else f'{number / 1e6:.3g} MB'


def with_image_shapes(synthesis: PyTree, images: jax.ShapeDtypeStruct, mesh: Mesh) -> PyTree:
  """A state on the devices of a mesh whose buffer has of its images only their shape and place there.

  Args:
    synthesis: `without` them.
    images: [M, N, H, W, C], of one device.
    mesh: The devices.
  """
  shape = (mesh.size * images.shape[0], *images.shape[1:])
  place = NamedSharding(mesh, parallel.SPREAD)
  return replay.replace_buffer(synthesis, images=jax.ShapeDtypeStruct(shape, images.dtype, sharding=place))


def allocate_on_host(synthesis: PyTree) -> PyTree:
  """A state whose buffer's images, of which it has only the shape, are black, and in host memory.

  Raises:
    ValueError: The host has not twice the memory, as a checkpoint copies them: said now, not when it is full.
  """
  images = replay.find_buffer(synthesis).images
  needed, there = 2 * int(np.prod(images.shape)), host_memory()
  if needed > there:
    raise ValueError(
        f'method.capacity needs {_size(needed)} of host memory, as images are copied while a checkpoint is written, '
        f'must be so low that {_size(there)} suffice.')
  return replay.replace_buffer(synthesis, images=np.zeros(images.shape, images.dtype))  # No memory until written.


def host_memory() -> int:
  """Bytes of this machine."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def allocate(synthesis: PyTree) -> PyTree:
  """A state whose buffer's images are black, on the devices, if it has only their shape and place; else as it is."""
  buffer = replay.find_buffer(synthesis)
  if buffer is None or not isinstance(buffer.images, jax.ShapeDtypeStruct):
    return synthesis
  zeros = jax.jit(lambda: jnp.zeros(buffer.images.shape, buffer.images.dtype), out_shardings=buffer.images.sharding)
  return replay.replace_buffer(synthesis, images=zeros())


def strip_images(synthesis: PyTree) -> PyTree:
  """A state as the programs take it: its buffer's images are elsewhere, and nothing is on the way."""
  return replay.replace_buffer(synthesis, images=None, added=None, drawn=None)


def device_view(synthesis: PyTree) -> PyTree:
  """A state as programs take it: `without` images if they are on the host, else as it is."""
  buffer = replay.find_buffer(synthesis)
  return synthesis if buffer is None or not isinstance(buffer.images, np.ndarray) else strip_images(synthesis)


def write(images: np.ndarray, added: np.ndarray, end: int) -> None:
  """Writes added images [M, B, ...] into the ring [M, N, ...], whose next slot after them is `end`."""
  num = added.shape[1]
  images[:, (end - num + np.arange(num)) % images.shape[1]] = added


def gather(images: np.ndarray, slots: np.ndarray) -> np.ndarray:
  """Images [n, B, H, W, C] of the slots [n, B] that the programs of all devices draw from stripes [M, N, H, W, C].

  Each device counts its slots from its own first stripe, and a batch has equally many of each stripe, in order: so the
  place in a batch says which. Of a slot of -1 the image is anything.
  """
  num_tasks, capacity = images.shape[:2]
  number, batch = slots.shape
  within = (slots % capacity).reshape(number, num_tasks, -1)
  found = np.empty((number, num_tasks, batch // num_tasks, *images.shape[2:]), images.dtype)
  for task in range(num_tasks):
    np.take(images[task], within[:, task], axis=0, out=found[:, task], mode='clip')
  return found.reshape(number, batch, *images.shape[2:])


def steps_per_chunk(num_steps: int, bytes_a_step: int, most: int | None = None) -> int:
  """The most steps that divide `num_steps` and whose images are at most so many bytes (default: CHUNK); at least 1."""
  most = CHUNK if most is None else most
  return max(n for n in range(1, num_steps + 1) if num_steps % n == 0 and (n == 1 or n * bytes_a_step <= most))


def with_host_writes(synthesize: Callable) -> Callable:
  """A method's compiled call, whose state comes and goes with its images on the host; what it adds joins them.

  Args:
    synthesize: (state `without` images, ...) -> (state, metrics).
  """

  def call(synthesis: PyTree, *inputs: Any) -> tuple[PyTree, Metrics]:
    images = replay.find_buffer(synthesis).images
    synthesis, metrics = synthesize(strip_images(synthesis), *inputs)
    buffer = replay.find_buffer(synthesis)
    write(images, np.asarray(buffer.added), int(buffer.next))
    return replay.replace_buffer(strip_images(synthesis), images=images), metrics

  return call


def with_host_batches(slots: Callable, steps: Callable, mesh: Mesh, num_steps: int, chunk: int) -> Callable:
  """The student's compiled steps, some at a time, each with its images from the host.

  Args:
    slots: (state, key) -> [num_steps, B].
    steps: (student, state, key, teacher, distill.Part of `chunk` steps) -> (student, state, metrics).
    mesh: The devices.
    num_steps: Steps in all.
    chunk: Divides them.
  """
  place = NamedSharding(mesh, parallel.BATCHES)

  def call(student: PyTree, synthesis: PyTree, key: Array, teacher: PyTree) -> tuple[PyTree, PyTree, Metrics]:
    images, synthesis, found = replay.find_buffer(synthesis).images, strip_images(synthesis), []
    drawn = np.asarray(slots(synthesis, key))
    for first in range(0, num_steps, chunk):
      gathered = gather(images, drawn[first:first + chunk])
      if len(found) > 1:
        jax.block_until_ready(found[-2])  # Else all images would be on their way at once.
      part = replay.HostBatches(np.asarray(first, np.int32), jax.device_put(gathered, place))
      student, synthesis, metrics = steps(student, synthesis, key, teacher, part)
      found.append(metrics)
    means = {name: np.mean([metrics[name] for metrics in found]) for name in found[0] if name != 'losses'}
    losses = np.concatenate([metrics['losses'] for metrics in found])
    return student, replay.replace_buffer(synthesis, images=images), means | {'losses': losses}

  return call


def with_host_sample(slots: Callable, sample: Callable) -> Callable:
  """A sample of a state whose images may be on the host.

  Args:
    slots: (state, key) -> [B].
    sample: (state, key, images [B, H, W, C] | None where the state has them, ...) -> anything.
  """

  def call(synthesis: PyTree, key: Array, *inputs: Any) -> PyTree:
    taken = device_view(synthesis)
    if taken is synthesis:
      return sample(synthesis, key, None, *inputs)
    drawn = np.asarray(slots(taken, jax.random.clone(key)))  # The same key: the same slots.
    return sample(taken, key, gather(replay.find_buffer(synthesis).images, drawn[None])[0], *inputs)

  return call
