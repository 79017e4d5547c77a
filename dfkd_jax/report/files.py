"""JSON values, atomic replacement of files, and one-line errors of the disk."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import IO, Any

import numpy as np


def to_json(value: Any, name: str) -> Any:
  """Converts arrays to numbers or lists, tuples to lists, NaN and infinity to None.

  Raises ValueError with `name` and the keys that lead to a value that JSON does not have.
  """
  if isinstance(value, dict):
    return {str(key): to_json(item, f'{name}.{key}') for key, item in value.items()}
  if isinstance(value, list | tuple) or np.ndim(value):
    return [to_json(item, f'{name}.{index}') for index, item in enumerate(value)]
  if value is None or isinstance(value, bool | int | str):
    return value
  array = np.asarray(value)
  if array.dtype.kind in 'OSUMmc':
    raise ValueError(f'{name!r} is {value!r}, which cannot be written as JSON.')
  if array.dtype.kind in 'biu':
    return array.item()
  number = float(str(array[()]))  # The shortest form: 0.1 rather than float32's 0.10000000149.
  return number if math.isfinite(number) else None


@contextlib.contextmanager
def reporting_disk_errors(path: str | os.PathLike) -> Iterator[None]:
  """Turns an OSError of the block into a ValueError of one line that names `path`."""
  try:
    yield
  except OSError as error:
    raise ValueError(f'Cannot write {os.fspath(path)}: {error.strerror}.') from error


@contextlib.contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
  """Opens a new file that replaces `path` when the block ends without error, and only then."""
  temporary = f'{os.fspath(path)}.{os.getpid()}.tmp'
  try:
    with open(temporary, 'wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise
  folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
  with contextlib.suppress(OSError):
    os.fsync(folder)  # Keeps the new name after a power failure, where the file system can.
  os.close(folder)
