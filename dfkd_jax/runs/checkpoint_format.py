"""Format of a checkpoint: arrays by path, the JSON object beside them, and errors of one line.

The JSON object of format 1:

  format: 1
  leaves: [path, shape, dtype] of every array
  checksums: CRC-32 of arrays by path; TensorStore does not notice a flipped bit
  meta: the caller's JSON values
  checksum: CRC-32 of all this
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dfkd_jax import parallel
from dfkd_jax.types import PyTree

# Errors that say nothing about the file: it may be whole, and readable later.
_TRANSIENT = re.compile(
    r'RESOURCE_EXHAUSTED|[Oo]ut of memory|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED'
    r'|\b(EIO|ESTALE|EACCES|EPERM|EMFILE|ENFILE|ENOMEM|ETIMEDOUT|EAGAIN)\b|Permission denied'
    r'|Too many open files|Input/output error|Stale file handle')
FORMAT = 1
LARGEST = 2**30  # Bytes of a leaf with a checksum: a second of work. Image buffers are larger.


def flatten(tree: PyTree) -> tuple[dict[str, Any], jax.tree_util.PyTreeDef]:
  """Returns the leaves by path, such as 'student/params/stem/kernel', and the tree's structure.

  NumPy scalars become arrays, since Orbax cannot read scalars back. Raises ValueError if there are
  no arrays, or a leaf is not an array of numbers or booleans.
  """
  paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  leaves = {}
  for keys, leaf in paths_and_leaves:
    path = jax.tree_util.keystr(keys, simple=True, separator='/')
    leaf = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
    dtype = getattr(leaf, 'dtype', np.dtype(object))
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) or dtype.kind in 'OSUMm':
      raise ValueError(f'Leaf {path!r} of the state is of type {type(leaf).__name__} and dtype '
                       f'{dtype}; it must be an array of numbers or booleans.')
    leaves[path] = leaf
  if not leaves or len(leaves) < len(paths_and_leaves):
    raise ValueError('The state has no arrays, or two leaves of it have the same path.')
  return leaves, structure


def check_architecture(where: str, saved: dict[str, tuple], leaves: dict[str, Any]) -> None:
  """Raises ValueError that names the first leaf of another (shape, dtype) than the saved one."""
  expected = {path: (tuple(leaf.shape), leaf.dtype.name) for path, leaf in leaves.items()}
  paths = [path for path in expected | saved if expected.get(path) != saved.get(path)]
  if not paths:
    return
  there, here = (f'{specs[paths[0]][1]}{list(specs[paths[0]][0])}' if paths[0] in specs
                 else 'missing' for specs in (saved, expected))
  more = f' (and {len(paths) - 1} more)' if len(paths) > 1 else ''
  raise ValueError(f'Checkpoint of another architecture, {where}: '
                   f'{paths[0]!r} is {there} there, {here} here{more}.')


def checksum(leaf: Any) -> int | None:
  """Returns the CRC-32 of an array; None if it is too large, or partly elsewhere."""
  leaf = parallel.local_copy(leaf)
  if leaf.nbytes > LARGEST or not getattr(leaf, 'is_fully_addressable', True):
    return None
  return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))


def make_entry(leaves: dict[str, Any], meta: dict) -> dict[str, Any]:
  """Returns the JSON object of a checkpoint."""
  specs = [[path, list(leaf.shape), leaf.dtype.name] for path, leaf in leaves.items()]
  checksums = {path: checksum(leaf) for path, leaf in leaves.items()}
  checksums = {path: crc for path, crc in checksums.items() if crc is not None}
  entry = {'format': FORMAT, 'leaves': specs, 'checksums': checksums, 'meta': meta}
  return entry | {'checksum': zlib.crc32(_canonical(entry))}


def entry_path(directory: str | os.PathLike, step: int) -> pathlib.Path:
  """Returns the file of the JSON object; a checkpoint without it is incomplete."""
  return pathlib.Path(directory, str(step), 'meta', 'metadata')


def read_entry(directory: str | os.PathLike, step: int) -> dict[str, Any]:
  """Returns the JSON object of a checkpoint.

  Raises DamagedError if it is missing or has changed, ValueError if it has another format.
  """
  where, path = f'step {step} in {directory}', entry_path(directory, step)
  if not path.is_file():
    raise DamagedError(f'Cannot read {where}: it is incomplete.')
  with storage_errors(f'read {where}', DamagedError):
    entry = json.loads(path.read_text(encoding='utf-8'))
  if not isinstance(entry, dict) or not {'format', 'leaves', 'meta'} <= entry.keys():
    raise DamagedError(f'Cannot read {where}: it has no meta data of a run.')
  if entry['format'] != FORMAT:
    raise ValueError(
        f'Step {step} in {directory} has format {entry["format"]}; this version reads {FORMAT}.')
  if entry.pop('checksum', None) not in (None, zlib.crc32(_canonical(entry))):
    raise DamagedError(f'Cannot read {where}: its meta data has changed.')
  return entry


def hash_json(value: dict) -> str:
  """Returns 16 hexadecimal digits of the SHA-256 of JSON values; the order of keys is ignored."""
  return hashlib.sha256(_canonical(value)).hexdigest()[:16]


def _canonical(value: dict) -> bytes:
  return json.dumps(value, sort_keys=True, separators=(',', ':')).encode()


class DamagedError(ValueError):
  """A checkpoint cannot be read, or differs from the saved one."""


@contextlib.contextmanager
def storage_errors(
    action: str, error_type: type[ValueError] = ValueError,
    advice: Callable[[], str] = lambda: '') -> Iterator[None]:
  """Turns any error within into 'Cannot <action>: <reason>. <advice()>' in one line.

  Raises `error_type`, or a plain ValueError if the error is transient.
  """
  try:
    yield
  except Exception as error:
    text = f'Cannot {action}: {short_reason(error)}'
    if more := advice():
      text = f'{text.rstrip(".")}. {more}'
    is_transient = (isinstance(error, (MemoryError, PermissionError, TimeoutError))
                    or _TRANSIENT.search(str(error)))
    raise (ValueError if is_transient else error_type)(text) from error


def short_reason(error: Exception) -> str:
  """Returns the first line of an error, without the details that TensorStore adds in brackets."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  line = re.split(r" \[\w+(\[\d+\])?='", lines[0] if lines else type(error).__name__, maxsplit=1)[0]
  # The reason of the system comes last.
  return line if len(line) <= 300 else f'{line[:80]} ... {line[-200:]}'
