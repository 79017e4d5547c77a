"""The folder of a run: whether it may be written, what of an earlier run is there, and whether that may go on."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from dfkd_jax import parallel, paths, report
from dfkd_jax.runs.checkpoint import Checkpoints

_FILES = (
    'metrics.jsonl', 'summary.json', 'images.png', 'fault.json', 'student.safetensors', 'student_best.safetensors',
    'weights.safetensors', 'weights_best.safetensors')
CONTROL = 'control'  # Its checkpoints, which go when a run comes to its end.
_FOLDERS = ('checkpoints', CONTROL)
_LOCK = '.lock'
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # Of a file system that has none.
_KEPT = {'weights': dict, 'changed': list, 'student': dict}  # Of a summary, to go on from.
_OURS = ('*.json.*.tmp', '*.jsonl.*.tmp', '*.png.*.tmp', '*.safetensors.*.tmp', 'checkpoints/.shared-*')


def check_place(workdir: pathlib.Path) -> None:
  """Raises ValueError if the folder could not be made or written, without trying to."""
  what, nearest = f'workdir is {str(workdir)!r}', paths.expand_path(workdir, 'workdir').absolute()
  while not os.path.lexists(nearest):
    nearest = nearest.parent
  if not nearest.is_dir():
    kind = 'file' if nearest.exists() else 'link that leads nowhere'
    raise ValueError(f'{what}, must be a folder: {nearest} is a {kind}.')
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise ValueError(f'{what}, must be writable: {nearest} is not.')
  for name in _FILES:  # Else a run would come to its end, and fail there.
    if (workdir / name).is_dir() or paths.special_kind(workdir / name):
      raise ValueError(f'{what}, must be a folder for a run: {name} in it is no file.')
  for name in _FOLDERS:
    if os.path.lexists(workdir / name) and not (workdir / name).is_dir():
      raise ValueError(f'{what}, must be a folder for a run: {name} in it is no folder.')


def read_stored(workdir: pathlib.Path) -> dict[str, Any]:
  """What is known of the run in a folder: the summary if it has ended, else its latest checkpoint's meta data."""
  if (summary := read_summary(workdir)) is not None:
    _check_whole(summary, workdir)
    return summary
  if not (workdir / 'checkpoints').is_dir():
    return {}
  with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
    return checkpoints.meta() if checkpoints.any() else {}


def read_summary(workdir: pathlib.Path) -> dict | None:
  """What a run that has ended left; None if there is none."""
  try:
    found = json.loads((workdir / 'summary.json').read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):  # A damaged one is written anew.
    return None
  return found if isinstance(found, dict) and isinstance(found.get('config'), dict) else None


def _check_whole(summary: dict, workdir: pathlib.Path) -> None:
  """Raises ValueError unless a summary has what a run needs that goes on from it."""
  try:
    report.format_summary(summary)
    lacking = [name for name, kind in _KEPT.items() if not isinstance(summary.get(name), kind)]
  except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
    lacking = [str(error)]
  if lacking:
    raise ValueError(f"{workdir / 'summary.json'} is no whole summary of a run: it lacks {lacking[0]}. Remove it, or "
                     'name another --workdir.')


@contextlib.contextmanager
def lock(workdir: pathlib.Path, seen: dict[str, Any] | None = None) -> Iterator[None]:
  """Makes the folder, and keeps it from other runs until the block, or the process, ends; removes what was cut off.

  Args:
    workdir: The folder.
    seen: What was there when this run was prepared, by `stored`; None: it is not looked at again.

  Raises:
    ValueError: It cannot be made, another process runs in it, or one has since `seen`.
  """
  with contextlib.ExitStack() as stack:
    with parallel.raise_on_all_processes():
      if parallel.is_first():
        stack.enter_context(_locked(workdir))
        if seen is not None and read_stored(workdir) != seen:
          raise ValueError(f'Another process has run in {workdir} since this one began. Start again, to go on with it.')
        _sweep(workdir)
    yield


def check_free(workdir: pathlib.Path) -> None:
  """Raises ValueError if another process runs in the folder, as far as can be told without writing."""
  if parallel.is_first() and (workdir / _LOCK).is_file():
    with _locked(workdir):
      pass


def _sweep(workdir: pathlib.Path) -> None:
  """Removes what a process that was killed had not finished."""
  for path in [path for pattern in _OURS for path in workdir.glob(pattern)]:
    try:
      path.unlink()
    except OSError as error:
      raise ValueError(f'Cannot remove {path}, which an earlier run left unfinished: {error.strerror}.') from error


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
  """By a file that stays: to remove it would let two processes hold one each."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = os.open(workdir / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # Of NFS only what may be written can be locked.
  except OSError as error:
    raise ValueError(f'Cannot write to {workdir}: {error.strerror}.') from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      os.close(file)
      if isinstance(error, BlockingIOError):
        raise ValueError(
            f'Another process is running in {workdir}. Name another --workdir, or wait for it.') from None
      raise ValueError(f'Cannot lock {workdir / _LOCK}: {error.strerror}.') from error
  try:
    yield
  finally:
    os.close(file)
