"""The folder of a run: whether it may be written, what of an earlier run is there, and whether that may go on."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dfkd_jax import parallel, paths, report
from dfkd_jax.checkpoint import Checkpoints
from dfkd_jax.names import known

# Where things lie and run, and what may be spent, is no part of what a run computes: it may go on with them changed.
FREE = (
    'budget.images', 'budget.minutes', 'buffer', 'compilation_cache', 'dataset.data_dir', 'device_memory_gb',
    'distributed.coordinator', 'distributed.num_processes', 'distributed.process_id', 'distributed.timeout',
    'faults.reseed', 'num_devices')
FORCE = 'force'
_FILES = (
    'metrics.jsonl', 'summary.json', 'images.png', 'fault.json', 'student.safetensors', 'student_best.safetensors',
    'weights.safetensors', 'weights_best.safetensors')
_SOURCES = ('teacher.source', 'judge.source')  # Wherever they lie: their weights are compared.
CONTROL = 'control'  # Its checkpoints, which go when a run comes to its end.
_FOLDERS = ('checkpoints', CONTROL)
_LOCK = '.lock'
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # Of a file system that has none.
_KEPT = {'weights': dict, 'changed': list, 'student': dict}  # Of a summary, to go on from.
_SHOWN = 4  # Differences that an error lists.
_OURS = ('*.json.*.tmp', '*.jsonl.*.tmp', '*.png.*.tmp', '*.safetensors.*.tmp', 'checkpoints/.shared-*')


def check_place(workdir: pathlib.Path) -> None:
  """Raises ValueError if the folder could not be made or written, without trying to."""
  what, nearest = f'workdir is {str(workdir)!r}', paths.expanded(workdir, 'workdir').absolute()
  while not os.path.lexists(nearest):
    nearest = nearest.parent
  if not nearest.is_dir():
    kind = 'file' if nearest.exists() else 'link that leads nowhere'
    raise ValueError(f'{what}, must be a folder: {nearest} is a {kind}.')
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise ValueError(f'{what}, must be writable: {nearest} is not.')
  for name in _FILES:  # Else a run would come to its end, and fail there.
    if (workdir / name).is_dir() or paths.special(workdir / name):
      raise ValueError(f'{what}, must be a folder for a run: {name} in it is no file.')
  for name in _FOLDERS:
    if os.path.lexists(workdir / name) and not (workdir / name).is_dir():
      raise ValueError(f'{what}, must be a folder for a run: {name} in it is no folder.')


def stored(workdir: pathlib.Path) -> dict[str, Any]:
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


def changed(
    there: dict[str, Any], here: dict, workdir: pathlib.Path, resume: str | None = None,
    passed_over: Callable[[str], bool] = lambda field: False) -> dict[str, Any]:
  """In what a run that is there may go on otherwise than it began: {field: {'there': value, 'here': value}}.

  Args:
    there: What is known of the run in the folder, by `stored`.
    here: The config that is wanted, as JSON has it.
    workdir: The folder, for the error.
    resume: None: in nothing; 'force': in whatever differs; 'force:FIELD,SECTION,...': in these alone.
    passed_over: Whether no word is to be lost on a field, since it is wrong by itself.

  Raises:
    ValueError: It differs in something else, or `resume` is none of these; or it has ended and left no checkpoint to go
      on from.
  """
  before = there.get('config', here)
  _check_resume(resume, flat(before).keys() | flat(here).keys())
  differ = differing({'config': before}, {'config': here}) if there else {}
  refused = [name for name in differ if not is_forced(resume, name) and not passed_over(name)]
  if refused:
    shown = '; '.join(f'{name} is {differ[name]["there"]!r} there, {differ[name]["here"]!r} here'
                      for name in refused[:_SHOWN])
    more = f'; and {len(refused) - _SHOWN} more' if len(refused) > _SHOWN else ''
    raise ValueError(
        f'{workdir} holds a run with another config: {shown}{more}. Name another --workdir, or go on with '
        f'--resume=force{f":{refused[0]}" if len(refused) == 1 else ""}.')
  if differ:
    check_goes_on(workdir)
  return differ


def differing(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
  """In which fields of the config, and in which weights, two runs differ: {name: {'there': value, 'here': value}}."""
  one, other = (flat(of['config']) | {f'weights.{name}': digest for name, digest in of.get('weights', {}).items()}
                for of in (there, here))
  compared = _compared(one), _compared(other)
  return {name: {'there': one.get(name), 'here': other.get(name)} for name in sorted(one.keys() | other.keys())
          if compared[0].get(name) != compared[1].get(name)}


def _compared(fields: dict[str, Any]) -> dict[str, Any]:
  """Of sources whether there is one, and its '#ENTRY': wherever it lies, its weights are compared by themselves."""
  return {name: value.split('#')[1:] if name in _SOURCES and isinstance(value, str) else value
          for name, value in fields.items()}


def essence(config: dict) -> dict[str, Any]:
  """What of a config, as JSON has it, two runs have in common that compute the same from the same weights."""
  return _compared(flat(config))


def is_forced(resume: str | None, field: str) -> bool:
  """Whether a run may go on with a field of the config changed, by the `resume` of `changed`."""
  kind, _, names = (resume or '').partition(':')
  return kind == FORCE and (not names or any(f'{field}.'.startswith(f'{name}.') for name in names.split(',')))


def check_goes_on(workdir: pathlib.Path) -> None:
  """Raises ValueError if a run that is there, and is to go on otherwise, has left no checkpoint to go on from."""
  folder = workdir / 'checkpoints'
  if folder.is_dir():
    with Checkpoints(folder, read_only=True) as checkpoints:
      if checkpoints.any():
        return
  raise ValueError(f'{workdir} holds a run that has ended, and no checkpoint to go on from. Name another --workdir.')


def jsonable(config: Any) -> dict:
  """A config (`ConfigDict`) as JSON has it: tuples as lists."""
  plain = lambda value: (
      {k: plain(v) for k, v in value.items()} if isinstance(value, dict)
      else [plain(v) for v in value] if isinstance(value, (list, tuple)) else value)
  return plain(config.to_dict())


def flat(config: dict) -> dict[str, Any]:
  """Fields by dotted name, without those that are FREE."""
  leaves = jax.tree_util.tree_leaves_with_path(config, is_leaf=lambda tree: not isinstance(tree, dict))
  found = {jax.tree_util.keystr(path, simple=True, separator='.'): value for path, value in leaves}
  return {name: value for name, value in found.items() if name not in FREE}


def _check_resume(resume: str | None, fields: set[str]) -> None:
  """Raises ValueError unless `resume` is as `changed` takes it."""
  if resume is None:
    return
  kind, colon, names = resume.partition(':')
  if kind != FORCE or (colon and not names):
    raise ValueError(f"resume is {resume!r}, must be 'force', or 'force:FIELD,...' for chosen fields of the config.")
  sections = {name.rsplit('.', depth)[0] for name in fields for depth in range(1, name.count('.') + 1)}
  for name in names.split(',') if colon else ():
    if name in FREE:
      raise ValueError(f'resume is {resume!r}, but {name} may change without it.')
    known(name, sorted(fields | sections), 'field')


@contextlib.contextmanager
def taken(workdir: pathlib.Path, seen: dict[str, Any] | None = None) -> Iterator[None]:
  """Makes the folder, and keeps it from other runs until the block, or the process, ends; removes what was cut off.

  Args:
    workdir: The folder.
    seen: What was there when this run was prepared, by `stored`; None: it is not looked at again.

  Raises:
    ValueError: It cannot be made, another process runs in it, or one has since `seen`.
  """
  with contextlib.ExitStack() as stack:
    with parallel.together():
      if parallel.is_first():
        stack.enter_context(_locked(workdir))
        if seen is not None and stored(workdir) != seen:
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
