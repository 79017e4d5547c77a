"""Files that are replaced in one go, and errors of the disk in one line."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import IO, Any

import numpy as np


def plain(value: Any, name: str) -> Any:
  """JSON values of what a run reports: arrays become numbers or lists, tuples lists, NaN and infinity None.

  Raises:
    ValueError: A value has no counterpart in JSON; `name` says which.
  """
  if isinstance(value, dict):
    return {str(key): plain(item, f'{name}.{key}') for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item, f'{name}.{index}') for index, item in enumerate(value)]
  if value is None or type(value) in (bool, int, str):
    return value
  array = np.asarray(value)
  if array.dtype.kind in 'OSUMmc':
    raise ValueError(f'{name!r} is {value!r}, which JSON has no word for.')
  if array.ndim:
    return [plain(item, f'{name}.{index}') for index, item in enumerate(array)]
  if array.dtype.kind in 'biu':
    return array.item()
  number = float(str(array[()]))  # As short as its own precision allows: 0.1, not the 0.10000000149 of float32.
  return number if math.isfinite(number) else None


@contextlib.contextmanager
def reporting_disk_errors(path: str | os.PathLike) -> Iterator[None]:
  """Turns what the file system refuses into one clear line."""
  try:
    yield
  except OSError as error:
    raise ValueError(f'Cannot write {os.fspath(path)}: {error.strerror}.') from error


@contextlib.contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
  """A new file that takes the place of `path` when the block ends well; otherwise nothing has changed."""
  temporary = f'{os.fspath(path)}.{os.getpid()}.tmp'
  try:
    with open(temporary, 'wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise


def _sync_folder(path: str | os.PathLike) -> None:
  """Makes the new name of a file outlast the machine, where the file system can."""
  folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      os.fsync(folder)
  finally:
    os.close(folder)
