"""Zip archives of weights. Their announced sizes are checked before anything is unpacked."""

import os
import zipfile
from collections.abc import Iterable

from dfkd_jax.messages import RefusedError

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
