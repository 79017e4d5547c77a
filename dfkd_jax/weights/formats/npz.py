"""What `numpy.savez` and `numpy.save` wrote: a header is compared with the bytes that follow before any is believed."""

import io
import math
import pathlib
import zipfile
from typing import BinaryIO, NamedTuple

import numpy as np

from dfkd_jax.messages import RefusedError, safe_name
from dfkd_jax.weights.formats import archives

_HEADER = 16 * 2**10  # Bytes to look for a header in: NumPy itself reads none above 10,000.
_PIECE = 2**20
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class _Header(NamedTuple):
  """What a file announces, and where its numbers begin."""

  shape: tuple[int, ...]
  fortran: bool
  dtype: np.dtype
  offset: int


def read_npz(data: bytes) -> dict[str, np.ndarray]:
  """The arrays of an archive, by name; pickled ones are refused.

  Args:
    data: All bytes of the file.

  Raises:
    RefusedError: If an array does not hold numbers, is not as long as its header says or is there twice, or all
      together are larger than `archives.LARGEST`.
    Exception: Of any kind, if the file is damaged.
  """
  arrays = {}
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    archives.check_sizes(archive.infolist())
    for info in archive.infolist():
      name = info.filename.removesuffix('.npy')
      if name in arrays:
        raise RefusedError(f'holds two arrays called {safe_name(name)}')
      arrays[name] = read_member(archive, info)
  return arrays


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str = 'fiub') -> np.ndarray:
  """An array of an archive, which is read-only.

  Args:
    archive: Whose sizes `archives.check_sizes` has seen.
    info: Of the member.
    kinds: Those of NumPy that it may be of.

  Raises:
    RefusedError: If it is of another kind, or not as long as its header says.
    Exception: Of any kind, if it is damaged.
  """
  name = safe_name(info.filename.removesuffix('.npy'))
  with archive.open(info) as member:
    header = _header(member.read(_HEADER), info.file_size, name)
  if header.dtype.kind not in kinds:
    raise RefusedError(f'holds {name} of dtype {safe_name(str(header.dtype))}, which is not one of numbers')
  with archive.open(info) as member:
    member.read(header.offset)
    return _array(header, member)


def read_npy(path: pathlib.Path) -> np.ndarray:
  """The array of a .npy file, of any dtype but objects; it is read-only.

  Raises:
    OSError: If there is no such file.
    RefusedError: If it is not as long as its header says, or larger than `archives.LARGEST`.
    Exception: Of any kind, if it is damaged.
  """
  with path.open('rb') as file:
    num_bytes = path.stat().st_size
    header = _header(file.read(_HEADER), num_bytes, 'an array')
    if num_bytes > archives.LARGEST:
      raise RefusedError(f'has {num_bytes} bytes, of which at most {archives.LARGEST} are read')
    file.seek(header.offset)
    return _array(header, file)


def _header(begin: bytes, num_bytes: int, name: str) -> _Header:
  """What a file that begins so and has so many bytes announces."""
  stream = io.BytesIO(begin)
  version = np.lib.format.read_magic(stream)
  if version not in _READERS:
    raise RefusedError(f'holds {name} in version {version} of the format, of which 1 and 2 are supported')
  shape, fortran, dtype = _READERS[version](stream)
  if dtype.hasobject:
    raise RefusedError(f'holds {name} of dtype {safe_name(str(dtype))}, which is not one of numbers')
  if (size := stream.tell() + math.prod(shape) * dtype.itemsize) != num_bytes:
    raise RefusedError(f'has {num_bytes} bytes of {name}, whose header says {safe_name(size)}')
  return _Header(shape, fortran, dtype, stream.tell())


def _array(header: _Header, file: BinaryIO) -> np.ndarray:
  """Of the bytes that follow, read piece by piece, so that they are never there twice."""
  data = np.empty(math.prod(header.shape) * header.dtype.itemsize, np.uint8)
  for begin in range(0, data.size, _PIECE):
    piece = memoryview(data[begin:begin + _PIECE])
    if file.readinto(piece) < len(piece):
      raise EOFError('it ends too early')
  array = np.ndarray(header.shape, header.dtype, data, order='F' if header.fortran else 'C')
  array.flags.writeable = False
  return array
