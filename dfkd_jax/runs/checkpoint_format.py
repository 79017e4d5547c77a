"""A pytree as a checkpoint has it: arrays by path, what is said of them, and where they go when they are read."""

import hashlib
import json
import zlib

import jax
import numpy as np

from dfkd_jax import parallel
from dfkd_jax.types import PyTree

LARGEST = 2**30  # Bytes of a leaf that has a checksum: a second and less. Larger ones are buffers of images.


def flatten(tree: PyTree) -> tuple[dict, jax.tree_util.PyTreeDef]:
  """Leaves by path; NumPy scalars as arrays, anything else that is not an array refused."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  named = {}
  for keys, leaf in leaves:
    path = jax.tree_util.keystr(keys, simple=True, separator='/')
    if path in named:
      raise ValueError(f'Two leaves of the state have the path {path!r}.')
    named[path] = _array(path, leaf)
  if not any(leaf.size for leaf in named.values()):
    raise ValueError('The state has no arrays.')
  return named, structure


def _array(path: str, leaf):
  if isinstance(leaf, np.generic):
    leaf = np.asarray(leaf)  # Orbax saves a NumPy scalar and cannot read it back.
  if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
    raise ValueError(f'Leaf {path!r} of the state is of type {type(leaf).__name__}; it must be a JAX or NumPy array.')
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.dtype.kind in 'OSUMm':
    raise ValueError(f'Leaf {path!r} of the state has dtype {leaf.dtype}; only numbers and booleans are kept.')
  return leaf


def specs(leaves: dict) -> list:
  """[path, shape, dtype] of each, as JSON."""
  return [[path, list(leaf.shape), leaf.dtype.name] for path, leaf in leaves.items()]


def checksums(leaves: dict) -> dict[str, int]:
  """CRC-32 of each that has one, by path."""
  found = {path: checksum(leaf) for path, leaf in leaves.items()}
  return {path: value for path, value in found.items() if value is not None}


def checksum(leaf) -> int | None:
  """CRC-32 of the bytes of an array; None of one that is empty, too large, or not whole on this process."""
  leaf = parallel.local_copy(leaf)
  if not 0 < leaf.nbytes <= LARGEST or not getattr(leaf, 'is_fully_addressable', True):
    return None
  return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))


def describe(spec: tuple | None) -> str:
  """(shape, dtype) in words; None: it is missing."""
  return f'{spec[1]}{list(spec[0])}' if spec else 'missing'


def target(leaf):
  """What Orbax is to make of a leaf: a NumPy array, or a JAX array in a definite place."""
  if isinstance(leaf, np.ndarray):
    return leaf
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def empty(target):
  """Of an array without elements, which Orbax does not keep."""
  zeros = np.zeros(target.shape, target.dtype)
  if isinstance(target, np.ndarray):
    return zeros
  return jax.make_array_from_callback(target.shape, target.sharding, lambda index: zeros[index])


def config_hash(config: dict) -> str:
  """First 16 hexadecimal digits of the SHA-256 of a config, whatever the order of its keys.

  Args:
    config: Nested dict of JSON values; tuples count as lists.

  Raises:
    ValueError: A value is not JSON.
  """
  return hashlib.sha256(_canonical(config, 'config').encode()).hexdigest()[:16]


def checksum_of(entry: dict) -> int:
  """CRC-32 of the meta data of a checkpoint."""
  return zlib.crc32(_canonical(entry, 'meta data of a checkpoint').encode())


def _canonical(value: dict, name: str) -> str:
  try:
    return json.dumps(value, sort_keys=True, separators=(',', ':'))
  except (TypeError, ValueError) as error:
    raise ValueError(f'The {name} must be JSON values: {error}.') from error
