"""Devices, processes and collectives: the only file that knows them.

A program of the library is written for one device, with an `axis` argument. It
runs as it stands where `axis` is None, and here it is mapped over devices. State
has the same global shapes on one device and on many: fields declared with
`sharded()` are split along their first axis, all others are replicated.

`jax.pmap` has lowered to `jit(shard_map)` since JAX 0.9.2; the latter is used
because it leaves global shapes alone, so that a checkpoint fits any number of
devices that divides the number of tasks. The per-device functions run under
`jax.pmap(axis_name=...)` as well: tests/test_parallel.py holds both, and one
device, to the same numbers.

Of several processes (jax.distributed) each runs the whole program, with the same
config: a mesh has the devices of all, and what all know alike is placed on it by
`place`. The first process alone writes and prints.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dfkd_jax.messages import FieldError
from dfkd_jax.types import Array, PRNGKey, PyTree

AXIS = 'devices'
REPLICATED = PartitionSpec()
SPREAD = PartitionSpec(AXIS)  # along the first axis
BATCHES = PartitionSpec(None, AXIS)  # [steps, B], each step's batch split


def sharded(**options: Any) -> dataclasses.Field:
  """Declares a dataclass field, with options of its own, whose arrays are split over devices along their first axis."""
  return struct.field(metadata={'sharded': True}, **options)


def pmean(tree: PyTree, axis: str | None) -> PyTree:
  """Mean over the devices of a mapped axis; the tree itself where `axis` is None.

  Integers are counts, alike on all devices, and stay as they are.
  """
  mean = lambda leaf: lax.pmean(leaf, axis) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
  return tree if axis is None else jax.tree.map(mean, tree)


def psum(tree: PyTree, axis: str | None) -> PyTree:
  """Sum over the devices of a mapped axis; the tree itself where `axis` is None."""
  return tree if axis is None else lax.psum(tree, axis)


def pmax(value: Array, axis: str | None) -> Array:
  """Largest over the devices of a mapped axis; the value itself where `axis` is None."""
  return value if axis is None else lax.pmax(value, axis)


def task_keys(key: PRNGKey, num_tasks: int, axis: str | None) -> Array:
  """Keys [M] of this device's tasks, which do not depend on how tasks are spread over devices."""
  first = 0 if axis is None else lax.axis_index(axis) * num_tasks
  return jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(num_tasks))


def by_task(
    function: Callable[[PRNGKey, Array], Array], num_tasks: int, axis: str | None
) -> Callable[[PRNGKey, Array], Array]:
  """Applies `function(key, images)` to each task's share of images [M * B, ...] with its own key."""

  def apply(key: PRNGKey, images: Array) -> Array:
    keys = task_keys(key, num_tasks, axis)
    if num_tasks == 1:
      return function(keys[0], images)
    shares = images.reshape(num_tasks, -1, *images.shape[1:])
    return jax.vmap(function)(keys, shares).reshape(images.shape)

  return apply


def make_mesh(num_devices: int | None = None) -> Mesh:
  """A mesh over the first `num_devices` devices (default: all) with the one axis `AXIS`; of several processes, all."""
  devices, processes = jax.devices(), jax.process_count()
  if processes > 1 and num_devices not in (None, len(devices)):
    raise FieldError(
        'num_devices', f'num_devices is {num_devices}, must be None or {len(devices)}, the devices of all {processes} processes.')
  if processes > 1 and not jax.distributed.is_initialized():
    raise ValueError(
        f"This is one of {processes} processes that cannot speak to each other: set distributed.coordinator to 'auto'.")
  if num_devices is not None and not 1 <= num_devices <= len(devices):
    raise FieldError('num_devices', f'num_devices is {num_devices}, must be in 1..{len(devices)}, the devices at hand.')
  return Mesh(np.asarray(devices[:num_devices]), (AXIS,))


def memory_limit(gigabytes: float | None = None) -> int | None:
  """Bytes that programs may use of a device: so many gigabytes, or what the device says; None: it does not say."""
  if gigabytes is not None:
    return int(1e9 * gigabytes)
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')


def specs(tree: PyTree) -> PyTree:
  """A tree of PartitionSpecs for a state: by `sharded()` fields, all else replicated."""
  return jax.tree.map(
      lambda node: _specs_of_fields(node) if dataclasses.is_dataclass(node) else REPLICATED, tree,
      is_leaf=dataclasses.is_dataclass)


def _specs_of_fields(node: PyTree) -> PyTree:
  fields = [field for field in dataclasses.fields(node) if field.metadata.get('pytree_node', True)]
  return node.replace(**{
      field.name: jax.tree.map(lambda _: SPREAD, getattr(node, field.name)) if field.metadata.get('sharded', False)
      else specs(getattr(node, field.name)) for field in fields})


def shardings(mesh: Mesh, tree: PyTree) -> PyTree:
  """Where each array of a state lives on the mesh."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, REPLICATED)


def place(mesh: Mesh, tree: PyTree, spec: PartitionSpec | None = None) -> PyTree:
  """A state on the devices of the mesh: all of it as `spec`, or by default as `specs` says.

  Of several processes each gives the whole state, the same on all.
  """
  places = shardings(mesh, tree) if spec is None else jax.tree.map(lambda _: NamedSharding(mesh, spec), tree)
  return jax.tree.map(_placed, tree, places) if jax.process_count() > 1 else jax.device_put(tree, places)


def _placed(leaf: Array, place: NamedSharding) -> Array:
  """Each process puts its own parts on its own devices; nothing is sent."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return jax.device_put(leaf, place)
  host = np.asarray(leaf)
  return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def local_copy(tree: PyTree) -> PyTree:
  """What is replicated, as arrays of one device of this process; all else as it is."""
  alone = lambda leaf: (
      leaf.addressable_data(0) if isinstance(leaf, jax.Array) and leaf.is_fully_replicated else leaf)
  return jax.tree.map(alone, tree)


def gather(tree: PyTree) -> PyTree:
  """A state as NumPy arrays, whole on every process; all must call it."""
  if jax.process_count() > 1:
    tree = multihost_utils.process_allgather(tree, tiled=True)
  return jax.device_get(tree)


def each_device(
    function: Callable[..., PyTree], mesh: Mesh, arguments: tuple[PyTree, ...], results: PyTree,
    donate: tuple[int, ...] = (),
) -> Callable[..., PyTree]:
  """Compiles a per-device function over a mesh.

  Args:
    function: Takes `axis=` (None on a mesh of one device) beside its arguments.
    mesh: From `make_mesh`.
    arguments: One tree of PartitionSpecs (see `specs`) for each argument.
    results: The same for what it returns.
    donate: Positions of arguments whose memory the results may take over.
  """
  if mesh.size == 1:
    return jax.jit(functools.partial(function, axis=None), donate_argnums=donate)
  mapped = jax.shard_map(
      functools.partial(function, axis=AXIS), mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False)
  return jax.jit(mapped, donate_argnums=donate)


def even_share(total: int, parts: int, what: str) -> int:
  """`total / parts`, which must be whole.

  Raises:
    ValueError: Names `what`, the number, and the nearest that would do.
  """
  if total < 1 or total % parts:
    near = max(parts, round(total / parts) * parts)
    raise FieldError(what, f'{what} is {total}, must be a positive multiple of {parts} (devices and tasks), such as {near}.')
  return total // parts
