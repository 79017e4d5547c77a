"""Differences between a run and the one in its folder, and whether it may continue with them."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
from flax import traverse_util

from dfkd_jax.config.fields import FREE, RUN_FIELDS
from dfkd_jax.messages import check_choice, short_repr
from dfkd_jax.runs.checkpoint import saved_steps
from dfkd_jax.runs.checkpoint_format import hash_json

_SOURCES = ('teacher.source', 'judge.source')  # The digests of their weights are compared instead.
_MAX_SHOWN = 4  # Differences that an error lists.
_DEFAULTS = {field.name: field.default for field in RUN_FIELDS}  # of runs before there was a field


def run_identity(config: dict[str, Any]) -> dict[str, Any]:
  """Returns {'config': JSON config, 'jax': settings of JAX that change a run's numbers}."""
  precision = None if config.get('precision') else jax.config.jax_default_matmul_precision
  return {'config': config, 'jax': {
      'default_prng_impl': jax.config.jax_default_prng_impl,
      'enable_x64': jax.config.jax_enable_x64, 'default_matmul_precision': precision}}


def config_changes(
    stored: dict[str, Any], current: dict[str, Any], workdir: pathlib.Path,
    resume: str | None = None, is_skipped: Callable[[str], bool] = lambda field: False,
) -> dict[str, Any]:
  """Returns `differing_fields` of a run and the one in its folder, if `resume` allows them.

  The `stored` record is from `folder.read_stored`; the `current` run is from `run_identity`,
  perhaps with 'weights'. `is_skipped` is for fields that are wrong by themselves. `resume` is None
  if no field may differ, 'force' if all may, or 'force:FIELD,SECTION,...'. Raises ValueError if
  another field differs, or the run in the folder has ended and left no checkpoint.
  """
  fields = {_config_field(name) for name in _fields(stored) | _fields(current)}
  forced = _forced_fields(resume, fields)
  changes = differing_fields(stored, current) if stored else {}
  refused = {name: change for name, change in changes.items()
             if _config_field(name) not in forced and not is_skipped(name)}
  if refused:
    shown = [f'{name} is {short_repr(change["there"], 40)} there, {short_repr(change["here"], 40)} '
             'here' for name, change in refused.items()]
    more = [f'and {len(shown) - _MAX_SHOWN} more'] if len(shown) > _MAX_SHOWN else []
    field = f':{_config_field(*refused)}' if len(refused) == 1 else ''
    raise ValueError(
        f'{workdir} holds a run with another config: {"; ".join(shown[:_MAX_SHOWN] + more)}. '
        f'Name another --workdir, or continue with --resume=force{field}.')
  if changes and not saved_steps(workdir / 'checkpoints'):
    raise ValueError(f'{workdir} holds a run that has ended, and no checkpoint to continue from. '
                     'Name another --workdir.')
  return changes


def _forced_fields(resume: str | None, fields: set[str]) -> set[str]:
  """Returns the `fields` that may differ; raises ValueError if `resume` names another field."""
  if resume is None:
    return set()
  kind, colon, names = resume.partition(':')
  if kind != 'force' or (colon and not names):
    raise ValueError(f"resume is {resume!r}, must be 'force', or 'force:FIELD,...' for chosen "
                     'fields of the config.')
  sections = {name.rsplit('.', depth)[0] for name in fields for depth in range(name.count('.') + 1)}
  names = names.split(',') if colon else []
  for name in names:
    if name in FREE:
      raise ValueError(f'resume is {resume!r}, but {name} may change without it.')
    check_choice(name, sorted(sections), 'field')
  return {field for field in fields
          if not colon or any(f'{field}.'.startswith(f'{name}.') for name in names)}


def differing_fields(stored: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of 'config', 'jax' and 'weights' in which two runs differ.

  As {name: {'there': value in `stored`, 'here': value in `current`}}, where a name is such as
  'distill.rounds', 'jax.enable_x64' or 'weights.teacher'. Older runs have no 'jax' to compare. A
  field that one of them lacks has its default there.
  """
  parts = {'config', *(stored.keys() & current.keys())}
  fields = [_fields({part: record.get(part, {}) for part in parts}) for record in (stored, current)]
  names = sorted(fields[0].keys() | fields[1].keys())
  there, here = ({name: each.get(name, _DEFAULTS.get(name)) for name in names} for each in fields)

  def compared(name, value):  # Of a source only its '#ENTRY', since the file may move.
    return value.split('#')[1:] if name in _SOURCES and isinstance(value, str) else value

  return {name: {'there': there[name], 'here': here[name]} for name in names
          if compared(name, there[name]) != compared(name, here[name])}


def _fields(record: dict[str, Any]) -> dict[str, Any]:
  return _flatten_config(record.get('config', {})) | {
      f'{part}.{name}': value for part in ('jax', 'weights')
      for name, value in record.get(part, {}).items()}


def _config_field(name: str) -> str:
  """Maps 'weights.teacher' to 'teacher.source', and 'weights.init_from.student' likewise."""
  weights = name.removeprefix('weights.')
  return weights if weights == name or '.' in weights else f'{weights}.source'


def _flatten_config(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of a JSON config by dotted name, without those that are FREE."""
  fields = traverse_util.flatten_dict(config, sep='.')
  return {name: value for name, value in fields.items() if name not in FREE}


def fingerprint(config: dict[str, Any]) -> str:
  """Returns a hash of a JSON config that FREE fields do not change."""
  return hash_json(_flatten_config(config))
