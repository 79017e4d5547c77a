"""SHA-256 of weights, in files or in memory."""

import hashlib
import pathlib
from collections.abc import Mapping

import numpy as np

from dfkd_jax.messages import explain_read_errors
from dfkd_jax.weights.formats import tfjs
from dfkd_jax.weights.reading import find_weights


def digest_files(path: pathlib.Path) -> str:
  """SHA-256 of a file of weights, as from sha256sum, or of the weights in a folder.

  The digest of a folder covers the names and digests of its files of weights, in order: a
  model.json with its shards, one file of the hub, or all files of Orbax. A model.json has the
  digest of its folder.

  Raises:
    OSError: There is no such file.
    ValueError: A folder holds no weights, or a model.json is damaged or lacks a shard.
  """
  path.stat()  # Raises OSError if there is none.
  with explain_read_errors(path):
    weights = find_weights(path) if path.is_dir() else path
    if weights.is_dir():
      folder = path
      names = sorted(
          file.relative_to(path).as_posix() for file in path.rglob('*') if file.is_file())
    else:
      folder = weights.parent
      is_model = weights.suffix == '.json'
      shards = tfjs.list_shards(weights.read_bytes(), folder) if is_model else []
      names = sorted({weights.name, *shards})
  digests = []
  for name in names:
    with (folder / name).open('rb') as file:
      digests.append(hashlib.file_digest(file, 'sha256').hexdigest())
  if names == [path.name] and not path.is_dir():
    return digests[0]
  lines = (f'{digest}  {name}\n' for digest, name in zip(digests, names, strict=True))
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
  """SHA-256 of the names, dtypes, shapes and bytes of arrays, in their order."""
  digest = hashlib.sha256()
  for name, array in arrays.items():
    digest.update(f'{name} {array.dtype} {array.shape}'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()
