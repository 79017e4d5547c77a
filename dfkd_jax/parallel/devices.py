"""Meshes, collectives, and programs that run on one device or on many.

Programs of the library are written for one device, with an `axis` argument. They run directly if
`axis` is None, and this module maps them over devices by `jit(shard_map)`. State has the same
global shapes on one device and on many, so a checkpoint fits any number of devices that divides
the number of tasks. Steps give the same numbers on any number of devices, up to rounding.

Each of several processes (jax.distributed) runs the whole program with the same config, on a mesh
of all their devices. Only the first process writes and prints.
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
SPREAD = PartitionSpec(AXIS)  # Along the first axis.
BATCHES = PartitionSpec(None, AXIS)  # [steps, B], with each step's batch split.


def sharded(**options: Any) -> dataclasses.Field:
  """Declares a dataclass field with arrays that are split over devices along their first axis."""
  return struct.field(metadata={'sharded': True}, **options)


def pmean(tree: PyTree, axis: str | None) -> PyTree:
  """Mean over the devices of a mapped axis, if any. Integers, equal on all, stay unchanged."""
  mean = lambda leaf: lax.pmean(leaf, axis) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
  return tree if axis is None else jax.tree.map(mean, tree)


def psum(tree: PyTree, axis: str | None) -> PyTree:
  """Sum over the devices of a mapped axis, if any."""
  return tree if axis is None else lax.psum(tree, axis)


def pmax(value: Array, axis: str | None) -> Array:
  """Maximum over the devices of a mapped axis, if any."""
  return value if axis is None else lax.pmax(value, axis)


def task_keys(key: PRNGKey, num_tasks: int, axis: str | None) -> Array:
  """Keys [M] of this device's tasks, independent of how tasks are spread over devices."""
  first = 0 if axis is None else lax.axis_index(axis) * num_tasks
  return jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(num_tasks))


def by_task(function: Callable[[PRNGKey, Array], Array], num_tasks: int,
            axis: str | None) -> Callable[[PRNGKey, Array], Array]:
  """Applies `function(key, images)` to each task's share of images [M * B, ...] and its own key."""

  def apply(key, images):
    keys = task_keys(key, num_tasks, axis)
    if num_tasks == 1:
      return function(keys[0], images)
    shares = images.reshape(num_tasks, -1, *images.shape[1:])
    results = jax.vmap(function)(keys, shares)
    return results.reshape(-1, *results.shape[2:])

  return apply


def make_mesh(num_devices: int | None = None) -> Mesh:
  """Makes a mesh over the first `num_devices` devices (default: all) with the one axis `AXIS`.

  Several processes must be joined, and take all their devices; otherwise raises a ValueError.
  """
  devices, processes, allowed = jax.devices(), jax.process_count(), None
  if processes > 1 and num_devices not in (None, len(devices)):
    allowed = f'None or {len(devices)}, the devices of all {processes} processes'
  elif num_devices is not None and not 1 <= num_devices <= len(devices):
    allowed = f'in 1..{len(devices)}, the devices at hand'
  if allowed:
    raise FieldError('num_devices', f'num_devices is {num_devices}, must be {allowed}.')
  if processes > 1 and not jax.distributed.is_initialized():
    raise ValueError(f'This is one of {processes} processes that are not joined: '
                     "set distributed.coordinator to 'auto'.")
  return Mesh(np.asarray(devices[:num_devices]), (AXIS,))


def memory_limit(gigabytes: float | None = None) -> int | None:
  """Bytes of a device's memory that programs may use. None asks the device, which may not know."""
  reported = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  return reported if gigabytes is None else int(1e9 * gigabytes)


def specs(tree: PyTree) -> PyTree:
  """PartitionSpecs of a state: SPREAD for fields declared by `sharded()`, otherwise REPLICATED."""

  def node_specs(node):
    if not dataclasses.is_dataclass(node):
      return REPLICATED
    parts = {}
    for field in dataclasses.fields(node):
      value = getattr(node, field.name)
      if field.metadata.get('sharded'):
        parts[field.name] = jax.tree.map(lambda _: SPREAD, value)
      elif field.metadata.get('pytree_node', True):
        parts[field.name] = specs(value)
    return node.replace(**parts)

  return jax.tree.map(node_specs, tree, is_leaf=dataclasses.is_dataclass)


def place(mesh: Mesh, tree: PyTree, spec: PartitionSpec | None = None) -> PyTree:
  """Places a state on the devices of the mesh, by one `spec` or by default by `specs`.

  Each of several processes passes the whole state, and places its parts; nothing is sent.
  """

  def place_leaf(leaf, sharding):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  tree_specs = specs(tree) if spec is None else jax.tree.map(lambda _: spec, tree)
  shardings = jax.tree.map(functools.partial(NamedSharding, mesh), tree_specs)
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)
  return jax.tree.map(place_leaf, tree, shardings)


def local_copy(tree: PyTree) -> PyTree:
  """Replaces replicated arrays by their copy on one device of this process."""
  is_replicated = lambda leaf: isinstance(leaf, jax.Array) and leaf.is_fully_replicated
  return jax.tree.map(lambda leaf: leaf.addressable_data(0) if is_replicated(leaf) else leaf, tree)


def gather(tree: PyTree) -> PyTree:
  """Gathers a state as whole NumPy arrays on every process; all processes must call it."""
  if jax.process_count() > 1:
    tree = multihost_utils.process_allgather(tree, tiled=True)
  return jax.device_get(tree)


def each_device(function: Callable[..., PyTree], mesh: Mesh, arguments: tuple[PyTree, ...],
                results: PyTree, donate: tuple[int, ...] = ()) -> Callable[..., PyTree]:
  """Compiles a per-device function, which takes `axis=` (None on one device), over a mesh.

  `arguments` are trees of PartitionSpecs (see `specs`), one for each argument; `results` is one.
  Arguments at the positions `donate` may lend their memory to the results.
  """
  if mesh.size == 1:
    return jax.jit(functools.partial(function, axis=None), donate_argnums=donate)
  mapped = jax.shard_map(functools.partial(function, axis=AXIS), mesh=mesh, in_specs=arguments,
                         out_specs=results, check_vma=False)
  return jax.jit(mapped, donate_argnums=donate)


def even_share(total: int, parts: int, name: str) -> int:
  """Divides `total` by `parts`. A FieldError of `name` gives the nearest allowed total."""
  if total < 1 or total % parts:
    nearest = max(parts, round(total / parts) * parts)
    raise FieldError(name, f'{name} is {total}, must be a positive multiple of {parts} (devices '
                     f'and tasks), such as {nearest}.')
  return total // parts
