"""Zip archives of weights. Their announced sizes are checked before anything is unpacked."""

import os
import zipfile
from collections.abc import Iterable

from dfkd_jax.messages import RefusedError, safe_name


def _memory_limit() -> int:
  """A third of the machine's memory, at most 16 GiB."""
  try:
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (AttributeError, OSError, ValueError):  # Some systems do not say.
    memory = 0
  return min(16 * 2**30, memory // 3 if memory > 0 else 16 * 2**30)


# Most bytes to unpack from one file. Leaves room for the file and the network beside them.
LARGEST = _memory_limit()


def check_sizes(members: Iterable[zipfile.ZipInfo]) -> None:
  """Checks that members of an archive fit in memory, by the sizes that they announce.

  Raises:
    RefusedError: Together they are larger than `LARGEST`. Or one is not stored or deflated: other
      methods unpack more than is asked for.
  """
  members = list(members)
  for info in members:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise RefusedError(
          f"has its member '{safe_name(info.filename)}' compressed by another method than deflate")
  if (total := sum(info.file_size for info in members)) > LARGEST:
    largest = max(members, key=lambda info: info.file_size)
    raise RefusedError(
        f"announces {total} bytes of members, the largest '{safe_name(largest.filename)}' "
        f'({largest.file_size} bytes), but at most {LARGEST} are unpacked')


def unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
  """Unpacks a member of a checked archive, but no more bytes than it announces."""
  with archive.open(info) as member:
    return member.read(info.file_size)  # `ZipFile.read` would unpack up to 2 GiB at once.
