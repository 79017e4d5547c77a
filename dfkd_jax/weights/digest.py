"""SHA-256 of weights, in files or in memory."""

import hashlib
import pathlib
from collections.abc import Mapping

import numpy as np

from dfkd_jax.messages import RefusedError, explain_read_errors, safe_name
from dfkd_jax.paths import special_kind
from dfkd_jax.weights.formats import tfjs
from dfkd_jax.weights.reading import find_weights


def digest_files(path: pathlib.Path) -> str:
  """SHA-256 of the weights at a path. Ignores other files beside them.

  | path | digest |
  |---|---|
  | a file | its own, as from sha256sum |
  | a model.json or its folder | of the names and digests of it and its shards, in order |
  | a folder with a file of weights | of the name and digest of this file |
  | a folder of Orbax | of the names and digests of all its files, in order |

  Raises:
    OSError: There is no such file.
    ValueError: A folder holds no weights, or a model.json is damaged or lacks a shard.
  """
  path.stat()  # Raises OSError if there is none.
  with explain_read_errors(path):
    folder, names = _list_files(path)
  if names == [path.name] and not path.is_dir():
    return _digest_file(path)
  lines = (f'{_digest_file(folder / name)}  {name}\n' for name in names)
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
  """SHA-256 of the names, dtypes, shapes and bytes of arrays, in their order."""
  digest = hashlib.sha256()
  for name, array in arrays.items():
    digest.update(f'{name} {array.dtype} {array.shape}'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def _list_files(path: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
  """Lists the files that `read` would read: their folder, and their names in it, in order."""
  if kind := special_kind(path):
    raise RefusedError(f'is {kind}')
  if path.is_dir():
    weights = find_weights(path)
    if weights.is_file():
      return _list_files(weights)
    return path, sorted(
        file.relative_to(path).as_posix() for file in path.rglob('*') if file.is_file())
  with path.open('rb') as file:
    shards = tfjs.list_shards(file.read()) if tfjs.is_model_json(file.peek(8)) else []
  if missing := [name for name in shards if not (path.parent / name).is_file()]:
    raise RefusedError(f'lacks its file {safe_name(missing[0])}')
  return path.parent, sorted({path.name, *shards})


def _digest_file(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
