"""Numbers of a run as lines of JSON, and files that are replaced in one go."""

import json
import math
import os
from typing import Any

from dfkd_jax import parallel
from dfkd_jax.report.files import plain, replace_file, reporting_disk_errors

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
    with reporting_disk_errors(self.path):
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
    with reporting_disk_errors(self.path):
      while left:
        left = left[self._file.write(left):]

  def sync(self) -> None:
    """Returns when the lines are on the disk, and outlast the machine.

    Raises:
      ValueError: The disk refuses them.
    """
    if parallel.is_first():
      with reporting_disk_errors(self.path):
        os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file; harmless a second time."""
    self._file.close()


def _trim(path: str, last: float) -> None:
  with open(path, 'rb') as file:
    lines = file.readlines()
  kept = [line for line in lines if _step(line) <= last]
  if kept != lines:
    with replace_file(path) as file:
      file.writelines(kept)


def _step(line: bytes) -> float:
  """Step of a line; NaN, which is below and above nothing, if the line is damaged."""
  try:
    return float(json.loads(line)['step']) if line.endswith(b'\n') else math.nan
  except (ValueError, TypeError, KeyError):
    return math.nan
