"""Writes the metrics of a run as lines of JSON."""

import contextlib
import json
import math
import os
from typing import Any

from dfkd_jax import parallel
from dfkd_jax.report.files import replace_file, reporting_disk_errors, to_json

METRICS = 'metrics.jsonl'


class MetricsWriter(contextlib.AbstractContextManager):
  """Appends lines to `metrics.jsonl`; a context manager. Only the first process writes.

  Creates the folder `workdir`, or raises ValueError. Drops damaged lines, and lines of steps
  after `resume_step`, which will be repeated. -1 drops all lines, None keeps all.
  """

  def __init__(self, workdir: str | os.PathLike, *, resume_step: int | None = None):
    self.path = os.path.join(workdir, METRICS) if parallel.is_first() else os.devnull
    with reporting_disk_errors(self.path):
      if parallel.is_first():
        os.makedirs(workdir, exist_ok=True)
        if os.path.exists(self.path):
          _trim(self.path, math.inf if resume_step is None else resume_step)
      # Unbuffered: a buffer would write bytes again that the disk has refused.
      self._file = open(self.path, 'ab', buffering=0)  # noqa: SIM115

  def __exit__(self, *error) -> None:
    self._file.close()

  def write(self, step: int, **numbers: Any) -> None:
    """Writes a line `{"step": ..., ...}`, which survives the end of this process.

    Numbers are scalars or None; NaN and infinity become null. Raises ValueError for other values,
    or if the line cannot be written.
    """
    entry = {'step': int(step)}
    for name, value in numbers.items():
      entry[name] = to_json(value, name)
      if isinstance(entry[name], str | list | dict):
        raise ValueError(f'Metric {name!r} is {value!r}, must be a number.')
    line = json.dumps(entry).encode() + b'\n'
    with reporting_disk_errors(self.path):
      while line:
        line = line[self._file.write(line):]

  def sync(self) -> None:
    """Waits until the lines are on the disk; raises ValueError if they cannot be written."""
    if parallel.is_first():
      with reporting_disk_errors(self.path):
        os.fsync(self._file.fileno())


def _trim(path: str, last: float) -> None:
  """Drops damaged lines, and lines of steps after `last`."""
  with open(path, 'rb') as file:
    lines, kept = file.readlines(), []
  for line in lines:
    with contextlib.suppress(ValueError, TypeError, KeyError):
      if line.endswith(b'\n') and json.loads(line)['step'] <= last:
        kept.append(line)
  if kept != lines:
    with replace_file(path) as file:
      file.writelines(kept)
