"""What `numpy.savez` wrote."""

import io
import math
import zipfile

import numpy as np

from dfkd_jax.models.pretrained import archives
from dfkd_jax.models.pretrained.errors import RefusedError

_HEADER = 16 * 2**10  # Bytes to look for a header in: NumPy itself reads none above 10,000.


def read_npz(data: bytes) -> dict[str, np.ndarray]:
  """The arrays of an archive, by name; pickled ones are refused.

  Args:
    data: All bytes of the file.

  Raises:
    RefusedError: If an array does not hold numbers, is not as long as its header says, or all together are larger
      than `archives.LARGEST`.
    Exception: Of any kind, if the file is damaged.
  """
  arrays = {}
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    archives.check_sizes(archive.infolist())
    for info in archive.infolist():
      name = info.filename.removesuffix('.npy')
      _check_header(archive, info, name)
      stream = io.BytesIO(archives.unpacked(archive, info))
      arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
  return arrays


def _check_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> None:
  """Looks at the beginning of a member alone."""
  with archive.open(info) as member:
    stream = io.BytesIO(member.read(_HEADER))
  version = np.lib.format.read_magic(stream)
  header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
  if header is None:
    raise RefusedError(f'holds {name} in version {version} of the format, of which 1 and 2 are supported')
  shape, _, dtype = header(stream)
  if dtype.kind not in 'fiub':
    raise RefusedError(f'holds {name} of dtype {dtype}, which is not one of numbers')
  if (size := stream.tell() + math.prod(shape) * dtype.itemsize) != info.file_size:
    raise RefusedError(f'has {info.file_size} bytes of {name}, whose header says {size}')
