"""Arrays that NumPy saved, in .npz archives and .npy files; never pickled objects."""

import io
import math
import pathlib
import zipfile
from typing import BinaryIO

import numpy as np

from dfkd_jax.messages import RefusedError, safe_name
from dfkd_jax.weights.formats import archives

_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(data: bytes) -> dict[str, np.ndarray]:
  """Reads the arrays of an archive, by name."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    archives.check_sizes(archive.infolist())
    return {info.filename.removesuffix('.npy'): read_member(archive, info)
            for info in archive.infolist()}


def read_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str = 'fiub') -> np.ndarray:
  """Reads one array of an archive, read-only.

  Args:
    archive: Checked by `archives.check_sizes`.
    info: The member.
    kinds: Allowed values of `dtype.kind`.
  """
  with archive.open(info) as file:
    return _read_array(
        file, info.file_size, safe_name(info.filename.removesuffix('.npy')), kinds)


def read_npy(path: pathlib.Path) -> np.ndarray:
  """Reads the array of a .npy file, read-only, of any dtype but objects."""
  num_bytes = path.stat().st_size
  if num_bytes > archives.LARGEST:
    raise RefusedError(f'has {num_bytes} bytes, but at most {archives.LARGEST} are read')
  with path.open('rb') as file:
    return _read_array(file, num_bytes, 'an array')


def _read_array(
    file: BinaryIO, num_bytes: int, name: str, kinds: str | None = None) -> np.ndarray:
  """Reads an array once its header agrees with the file's size: NumPy allocates it at once."""
  read_header = _HEADER_READERS[np.lib.format.read_magic(file)]
  shape, _, dtype = read_header(file)
  if dtype.hasobject or (kinds and dtype.kind not in kinds):
    raise RefusedError(f'holds {name} of dtype {safe_name(str(dtype))}, not of numbers')
  size = file.tell() + math.prod(shape) * dtype.itemsize
  if size != num_bytes:
    raise RefusedError(f'has {num_bytes} bytes of {name}, but its header announces {size}')
  file.seek(0)
  array = np.load(file, allow_pickle=False)
  array.flags.writeable = False
  return array
