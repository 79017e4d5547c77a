"""What `numpy.savez` wrote."""

import io
import zipfile

import numpy as np

from dfkd_jax.models.pretrained.errors import RefusedError


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
    for member in archive.namelist():
      name, stream = member.removesuffix('.npy'), io.BytesIO(archive.read(member))
      arrays[name] = _numbers(name, stream)
  return arrays


def _numbers(name: str, stream: io.BytesIO) -> np.ndarray:
  version = np.lib.format.read_magic(stream)
  header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
  if header is None:
    raise RefusedError(f'holds {name} in version {version} of the format, of which 1 and 2 are supported')
  _, _, dtype = header(stream)
  if dtype.kind not in 'fiub':
    raise RefusedError(f'holds {name} of dtype {dtype}, which is not one of numbers')
  stream.seek(0)
  return np.lib.format.read_array(stream, allow_pickle=False)
