"""The folder of a run: whether it may be written, which run it holds, and its lock."""

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import filelock

from dfkd_jax import parallel, paths, report
from dfkd_jax.report.summary import SUMMARY
from dfkd_jax.runs.checkpoint import read_meta, saved_steps

CHECKPOINTS = 'checkpoints'
CONTROL = 'control'  # Checkpoints of the noise control, deleted when the run ends.
_UNFINISHED = (  # Left by a process that was killed.
    '*.json.*.tmp', '*.jsonl.*.tmp', '*.png.*.tmp', '*.safetensors.*.tmp', 'checkpoints/.shared-*')
_LOCK = '.lock'


def check_place(workdir: pathlib.Path) -> None:
  """Raises ValueError if a run could not write its files here, or if another one runs here."""
  text, nearest = f'workdir is {str(workdir)!r}', paths.expand_path(workdir, 'workdir').absolute()
  while not os.path.lexists(nearest):
    nearest = nearest.parent
  if not nearest.is_dir():
    kind = 'file' if nearest.exists() else 'broken link'
    raise ValueError(f'{text}, must be a folder: {nearest} is a {kind}.')
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise ValueError(f'{text}, must be writable: {nearest} is not.')
  if parallel.is_first() and (workdir / _LOCK).is_file():
    with _acquire(workdir):
      pass


def read_stored(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the record of the run in a folder; empty if there is none.

  The record is the summary if the run has ended, otherwise the meta data of its latest checkpoint.
  Raises ValueError if it cannot be read, or the summary lacks an entry.
  """
  checkpoints, summary = workdir / CHECKPOINTS, None
  with contextlib.suppress(OSError, ValueError, RecursionError):
    summary = json.loads((workdir / SUMMARY).read_text(encoding='utf-8'))
  if not isinstance(summary, dict) or not isinstance(summary.get('config'), dict):
    return read_meta(checkpoints) if saved_steps(checkpoints) else {}
  try:
    report.check_summary(summary)
  except ValueError as error:
    raise ValueError(f'{workdir / SUMMARY} is no whole summary of a run: {error}. Remove it, '
                     'or name another --workdir.') from None
  return summary


def rename_summary(workdir: pathlib.Path, done: int) -> None:
  """Renames the summary of an ended run that continues to `summary_after_<done>.json`."""
  path = workdir / SUMMARY
  with parallel.raise_on_all_processes():
    if parallel.is_first() and path.exists():
      suffixes = itertools.chain([''], (f'_{number}' for number in itertools.count(2)))
      names = (workdir / f'summary_after_{done}{suffix}.json' for suffix in suffixes)
      with report.reporting_disk_errors(path):
        os.replace(path, next(name for name in names if not name.exists()))


@contextlib.contextmanager
def lock(workdir: pathlib.Path, stored: dict[str, Any] | None = None) -> Iterator[None]:
  """Makes and locks the folder until the block or the process ends; removes unfinished files.

  Raises ValueError if it cannot be written, or another process runs in it or has changed `stored`.
  """
  with contextlib.ExitStack() as stack:
    with parallel.raise_on_all_processes():
      if parallel.is_first():
        with report.reporting_disk_errors(workdir):
          workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_acquire(workdir))
        if stored is not None and read_stored(workdir) != stored:
          raise ValueError(f'Another process has run in {workdir} since this one began. '
                           'Start again to continue from there.')
        for path in [path for pattern in _UNFINISHED for path in workdir.glob(pattern)]:
          with report.reporting_disk_errors(path):
            path.unlink()
    yield


def _acquire(workdir: pathlib.Path) -> contextlib.AbstractContextManager:
  try:
    return filelock.FileLock(workdir / _LOCK, timeout=0).acquire()
  except filelock.Timeout:
    raise ValueError(f'Another process is running in {workdir}. '
                     'Name another --workdir, or wait for it.') from None
  except PermissionError as error:
    raise ValueError(f'Cannot write {workdir / _LOCK}: {error.strerror}.') from error
  except (OSError, NotImplementedError):  # The file system has no locks.
    return contextlib.nullcontext()
