"""How the config of a run differs from the one in its folder."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from dfkd_jax.config.fields import FREE
from dfkd_jax.messages import check_choice
from dfkd_jax.runs.checkpoint import Checkpoints

FORCE = 'force'
_SOURCES = ('teacher.source', 'judge.source')  # Wherever they lie: their weights are compared.
_SHOWN = 4  # Differences that an error lists.


def config_changes(
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
  _check_resume(resume, flatten(before).keys() | flatten(here).keys())
  differ = differing_fields({'config': before}, {'config': here}) if there else {}
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


def differing_fields(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
  """In which fields of the config, and in which weights, two runs differ: {name: {'there': value, 'here': value}}."""
  one, other = (flatten(of['config']) | {f'weights.{name}': digest for name, digest in of.get('weights', {}).items()}
                for of in (there, here))
  compared = _compared(one), _compared(other)
  return {name: {'there': one.get(name), 'here': other.get(name)} for name in sorted(one.keys() | other.keys())
          if compared[0].get(name) != compared[1].get(name)}


def _compared(fields: dict[str, Any]) -> dict[str, Any]:
  """Of sources whether there is one, and its '#ENTRY': wherever it lies, its weights are compared by themselves."""
  return {name: value.split('#')[1:] if name in _SOURCES and isinstance(value, str) else value
          for name, value in fields.items()}


def identity(config: dict) -> dict[str, Any]:
  """What of a config, as JSON has it, two runs have in common that compute the same from the same weights."""
  return _compared(flatten(config))


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


def flatten(config: dict) -> dict[str, Any]:
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
    check_choice(name, sorted(fields | sections), 'field')
