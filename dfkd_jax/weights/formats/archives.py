"""Zip archives of weights: what they announce is looked at before any of it is unpacked in memory."""

import os
import zipfile
from collections.abc import Iterable

from dfkd_jax.messages import RefusedError, safe_name


def _largest() -> int:
  try:
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (AttributeError, OSError, ValueError):  # Systems that do not say.
    memory = 0
  return min(16 * 2**30, memory // 3 if memory > 0 else 16 * 2**30)


# Bytes that may be unpacked of one file: more than networks have that are distilled here, and so few that the file,
# what it unpacks to and the network find room beside each other.
LARGEST = _largest()
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # Those of other methods unpack at once, however much that is.


def check_stored(archive: zipfile.ZipFile, num_bytes: int) -> None:
  """Makes sure that an archive is as PyTorch writes it: all members as they are, and no more of them than its bytes.

  Args:
    archive: That is to be read.
    num_bytes: Of the file.

  Raises:
    RefusedError: If a member is compressed, or members announce more than there is.
  """
  for info in archive.infolist():
    if info.compress_type != zipfile.ZIP_STORED:
      raise RefusedError(f'has its member {_named(info)} compressed, as PyTorch has none')
  _check_sum(archive.infolist(), num_bytes, f'and the file itself has {num_bytes}')


def check_sizes(members: Iterable[zipfile.ZipInfo]) -> None:
  """Makes sure that members can be unpacked in memory, by what they announce.

  Raises:
    RefusedError: If together they are larger than `LARGEST`, or packed by other methods than NumPy's and Keras'.
  """
  members = list(members)
  for info in members:
    if info.compress_type not in _METHODS:
      raise RefusedError(f'has its member {_named(info)} compressed by another method than deflate')
  _check_sum(members, LARGEST, f'of which at most {LARGEST} are unpacked')


def unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
  """A member of a checked archive, and never more than it announces."""
  with archive.open(info) as member:
    return member.read(info.file_size)


def _check_sum(members: list[zipfile.ZipInfo], most: int, why: str) -> None:
  if (total := sum(info.file_size for info in members)) > most:
    largest = max(members, key=lambda info: info.file_size)
    raise RefusedError(f'announces {total} bytes of members, the largest {_named(largest)}, {why}')


def _named(info: zipfile.ZipInfo) -> str:
  return f"'{safe_name(info.filename)}' ({info.file_size} bytes)"
