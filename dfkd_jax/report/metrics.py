"""Numbers of a run as lines of JSON, and files that are replaced in one go."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from dfkd_jax import parallel

METRICS = 'metrics.jsonl'


class MetricsWriter:
  """Appends one JSON object a line to `metrics.jsonl`; a context manager. Of several processes the first alone writes.

  Args:
    workdir: Made if missing.
    resume_step: Lines of later steps are dropped, for these steps are done again; -1 drops all, None keeps all. A line
      that was cut off is dropped in any case.

  Raises:
    ValueError: `workdir` cannot be written.
  """

  def __init__(self, workdir: str | os.PathLike, *, resume_step: int | None = None):
    self.path = os.path.join(workdir, METRICS) if parallel.is_first() else os.devnull
    with writing(self.path):
      if parallel.is_first():
        os.makedirs(workdir, exist_ok=True)
        if os.path.exists(self.path):
          _trim(self.path, math.inf if resume_step is None else resume_step)
      # Without a buffer, which would hold what the disk had refused, and be written once more at the end.
      self._file = open(self.path, 'ab', buffering=0)  # noqa: SIM115

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def write(self, step: int, **numbers: Any) -> None:
    """Writes a line `{"step": ..., ...}`, which a process that is killed leaves behind.

    Args:
      step: Round or step of the run.
      **numbers: Python, NumPy or JAX scalars, or None. JSON has no NaN and no infinity: both become null.

    Raises:
      ValueError: A value is not a number, or the disk refuses the line.
    """
    entry = {'step': int(step)}
    for name, value in numbers.items():
      entry[name] = plain(value, name)
      if isinstance(entry[name], str | list | dict):
        raise ValueError(f'Metric {name!r} is {value!r}; it must be a number.')
    left = json.dumps(entry).encode() + b'\n'
    with writing(self.path):
      while left:
        left = left[self._file.write(left):]

  def sync(self) -> None:
    """Returns when the lines are on the disk, and outlast the machine.

    Raises:
      ValueError: The disk refuses them.
    """
    if parallel.is_first():
      with writing(self.path):
        os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file; harmless a second time."""
    self._file.close()


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
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Turns what the file system refuses into one clear line."""
  try:
    yield
  except OSError as error:
    raise ValueError(f'Cannot write {os.fspath(path)}: {error.strerror}.') from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
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


def _trim(path: str, last: float) -> None:
  with open(path, 'rb') as file:
    lines = file.readlines()
  kept = [line for line in lines if _step(line) <= last]
  if kept != lines:
    with replacing(path) as file:
      file.writelines(kept)


def _step(line: bytes) -> float:
  """Step of a line; NaN, which is below and above nothing, if the line is damaged."""
  try:
    return float(json.loads(line)['step']) if line.endswith(b'\n') else math.nan
  except (ValueError, TypeError, KeyError):
    return math.nan
