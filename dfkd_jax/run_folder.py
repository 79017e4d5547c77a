"""The folder of a run: whether it may be written, what of an earlier run is there, and whether that may go on."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dfkd_jax import parallel
from dfkd_jax.checkpoint import Checkpoints
from dfkd_jax.names import known

# Where things lie and run, and what may be spent, is no part of what a run computes: it may go on with them changed.
FREE = (
    'budget.images', 'budget.minutes', 'buffer', 'compilation_cache', 'dataset.data_dir', 'device_memory_gb',
    'distributed.coordinator', 'distributed.num_processes', 'distributed.process_id', 'distributed.timeout',
    'faults.reseed', 'num_devices')
FORCE = 'force'
_LONGEST_NAME = 255  # Of a file or folder, on the usual file systems.
_FILES = (
    'metrics.jsonl', 'summary.json', 'images.png', 'fault.json', 'student.safetensors', 'student_best.safetensors',
    'weights.safetensors', 'weights_best.safetensors')
_SHOWN = 4  # Differences that an error lists.
_OURS = ('*.json.*.tmp', '*.jsonl.*.tmp', '*.png.*.tmp', '*.safetensors.tmp')


def check_place(workdir: pathlib.Path) -> None:
  """Raises ValueError if the folder could not be made or written, without trying to."""
  what, nearest = f'workdir is {str(workdir)!r}', workdir.absolute()
  if '\0' in str(workdir):
    raise ValueError(f'{what}, must be a path.')
  if (longest := max(map(len, map(os.fsencode, workdir.parts)), default=0)) > _LONGEST_NAME:
    raise ValueError(f'{what}, must have names of at most {_LONGEST_NAME} bytes, not {longest}.')
  while not os.path.lexists(nearest):
    nearest = nearest.parent
  if not nearest.is_dir():
    kind = 'file' if nearest.exists() else 'link that leads nowhere'
    raise ValueError(f'{what}, must be a folder: {nearest} is a {kind}.')
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise ValueError(f'{what}, must be writable: {nearest} is not.')
  for name in _FILES:  # Else a run would come to its end, and fail there.
    if (workdir / name).is_dir():
      raise ValueError(f'{what}, must be a folder for a run: {name} in it is no file.')
  if os.path.lexists(workdir / 'checkpoints') and not (workdir / 'checkpoints').is_dir():
    raise ValueError(f'{what}, must be a folder for a run: checkpoints in it is no folder.')


def stored(workdir: pathlib.Path) -> dict[str, Any]:
  """What is known of the run in a folder: the summary if it has ended, else its latest checkpoint's meta data."""
  if (summary := read_summary(workdir)) is not None:
    return summary
  if not (workdir / 'checkpoints').is_dir():
    return {}
  with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
    return checkpoints.meta() if checkpoints.any() else {}


def read_summary(workdir: pathlib.Path) -> dict | None:
  """What a run that has ended left; None if there is none."""
  try:
    found = json.loads((workdir / 'summary.json').read_text(encoding='utf-8'))
  except (OSError, ValueError):  # A damaged one is written anew.
    return None
  return found if isinstance(found, dict) and 'config' in found else None


def changed(
    there: dict | None, here: dict, workdir: pathlib.Path, resume: str | None = None,
    passed_over: Callable[[str], bool] = lambda field: False) -> dict[str, Any]:
  """In what a run that is there may go on otherwise than it began: {field: {'there': value, 'here': value}}.

  Args:
    there: Config of the run in the folder, as JSON has it; None: there is none.
    here: As it is wanted.
    workdir: The folder, for the error.
    resume: None: in nothing; 'force': in whatever differs; 'force:FIELD,SECTION,...': in these alone.
    passed_over: Whether no word is to be lost on a field, since it is wrong by itself.

  Raises:
    ValueError: It differs in something else, or `resume` is none of these.
  """
  wanted, at_hand = (flat(config) for config in (there or here, here))
  free = _forced(resume, wanted.keys() | at_hand.keys())
  differ = {name: {'there': wanted.get(name), 'here': at_hand.get(name)} for name in sorted(wanted.keys() | at_hand)
            if wanted.get(name) != at_hand.get(name)}
  refused = [name for name in differ if free != '*' and not passed_over(name)
             and not any(f'{name}.'.startswith(f'{field}.') for field in free)]
  if refused:
    shown = '; '.join(f'{name} is {differ[name]["there"]!r} there, {differ[name]["here"]!r} here'
                      for name in refused[:_SHOWN])
    more = f'; and {len(refused) - _SHOWN} more' if len(refused) > _SHOWN else ''
    raise ValueError(
        f'{workdir} holds a run with another config: {shown}{more}. Name another --workdir, or go on with '
        f'--resume=force{f":{refused[0]}" if len(refused) == 1 else ""}.')
  return differ


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


def _forced(resume: str | None, fields: set[str]) -> tuple[str, ...] | str:
  """The fields and sections that may differ; '*': all."""
  if resume is None:
    return ()
  kind, colon, names = resume.partition(':')
  if kind != FORCE or (colon and not names):
    raise ValueError(f"resume is {resume!r}, must be 'force', or 'force:FIELD,...' for chosen fields of the config.")
  sections = {name.rsplit('.', depth)[0] for name in fields for depth in range(1, name.count('.') + 1)}
  return tuple(known(name, sorted(fields | sections), 'field') for name in names.split(',')) if colon else '*'


@contextlib.contextmanager
def taken(workdir: pathlib.Path) -> Iterator[None]:
  """Makes the folder, and keeps it from other runs until the block, or the process, ends; removes what was cut off.

  Raises:
    ValueError: It cannot be made, or another process runs in it.
  """
  with contextlib.ExitStack() as stack:
    with parallel.together():
      if parallel.is_first():
        stack.enter_context(_locked(workdir))
        for pattern in _OURS:
          for path in workdir.glob(pattern):
            path.unlink()
    yield


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    folder = os.open(workdir, os.O_RDONLY)
  except OSError as error:
    raise ValueError(f'Cannot write to {workdir}: {error.strerror}.') from error
  try:
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(folder)
    raise ValueError(f'Another process is running in {workdir}. Name another --workdir, or wait for it.') from None
  except OSError:  # Of a file system without locks.
    pass
  try:
    yield
  finally:
    os.close(folder)
