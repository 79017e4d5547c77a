"""What `numpy.savez` wrote."""

import io
import math
import zipfile

import numpy as np

from dfkd_jax.models.pretrained.errors import RefusedError

LARGEST = 2**34  # Bytes that an archive may unpack to.
_HEADER = 2**14  # Bytes in which an array's header ends.


def read_npz(data: bytes) -> dict[str, np.ndarray]:
  """The arrays of an archive, by name; pickled ones are refused.

  Args:
    data: All bytes of the file.

  Raises:
    RefusedError: If an array does not hold numbers.
    Exception: Of any kind, if the file is damaged.
  """
  arrays = {}
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    check_total(archive)
    for member in archive.infolist():
      name = member.filename.removesuffix('.npy')
      with archive.open(member) as stream:
        size = _size(name, io.BytesIO(stream.read(_HEADER)))
      if size != member.file_size:
        raise RefusedError(f'holds {name} of {size:,} bytes by its header, but {member.file_size:,} in the archive')
      arrays[name] = np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False)
  return arrays


def check_total(archive: zipfile.ZipFile) -> None:
  """Raises RefusedError if an archive would be larger unpacked than any weights are: zeros shrink by a thousand."""
  if (total := sum(member.file_size for member in archive.infolist())) > LARGEST:
    raise RefusedError(f'unpacks to {total:,} bytes, may be {LARGEST:,} at most')


def _size(name: str, stream: io.BytesIO) -> int:
  """Bytes of an array of numbers and its header, by the latter."""
  version = np.lib.format.read_magic(stream)
  header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
  if header is None:
    raise RefusedError(f'holds {name} in version {version} of the format, of which 1 and 2 are supported')
  shape, _, dtype = header(stream)
  if dtype.kind not in 'fiub':
    raise RefusedError(f'holds {name} of dtype {dtype}, which is not one of numbers')
  return stream.tell() + math.prod(shape) * dtype.itemsize
