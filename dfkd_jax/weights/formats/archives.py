"""Zip archives, whose announced sizes are checked first, and NumPy's arrays in them (.npz)."""

import math
import os
import zipfile
from collections.abc import Iterable

import numpy as np

from dfkd_jax.messages import RefusedError, safe_name

try:
  _MEMORY = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
except (AttributeError, OSError, ValueError):  # Some systems do not say.
  _MEMORY = 48 * 2**30

# Most bytes to unpack from one file. Leaves room for the file and the network beside them.
LARGEST = min(16 * 2**30, _MEMORY // 3)


def check_sizes(members: Iterable[zipfile.ZipInfo]) -> None:
  """Raises RefusedError if members of an archive announce more than `LARGEST` bytes together."""
  if (total := sum(info.file_size for info in members)) > LARGEST:
    raise RefusedError(f'announces {total} bytes of members, but at most {LARGEST} are unpacked')


def read_npz(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
  """Reads the arrays of an archive, by name."""
  return {info.filename.removesuffix('.npy'): read_member(archive, info)
          for info in archive.infolist()}


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str = 'fiub') -> np.ndarray:
  """Reads one array of a checked archive, read-only, of an allowed `dtype.kind`."""
  name, layout = safe_name(info.filename.removesuffix('.npy')), np.lib.format
  with archive.open(info) as file:
    is_old = layout.read_magic(file) == (1, 0)
    read_header = layout.read_array_header_1_0 if is_old else layout.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.kind not in kinds:
      raise RefusedError(f'holds {name} of dtype {safe_name(str(dtype))}, not of numbers')
    size = file.tell() + math.prod(shape) * dtype.itemsize
    if size != info.file_size:  # NumPy allocates the announced size at once.
      raise RefusedError(f'has {info.file_size} bytes of {name}, but its header announces {size}')
    file.seek(0)
    array = np.load(file, allow_pickle=False)
  array.flags.writeable = False
  return array
