"""Checks the structure of a config and each value by its row in the table of fields."""

import json
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from dfkd_jax.config.fields import BY_NAME, OPEN, RUN_FIELDS, is_open
from dfkd_jax.config.problems import caught, wrong_value
from dfkd_jax.messages import FieldError, nearest
from dfkd_jax.paths import expand_path

_ORDER = {name: index for index, name in enumerate(BY_NAME)}
_NO_PATHS = ('hf:', 'embedded:')  # sources that are no paths


def check_structure(config: ConfigDict) -> Iterator[FieldError]:
  """Yields fields that are missing, unknown or no section; without any a config can be resolved."""
  values, names = dict(leaves(config)), [field.name for field in RUN_FIELDS]
  sections = {name.rpartition('.')[0] for name in names} | {'augment', *OPEN} - {''}
  for name in sorted(sections & values.keys()):
    if not isinstance(values[name], ConfigDict):
      yield wrong_value(name, values[name], 'a section of the config.')
      return
  missing = [name for name in names if name not in values
             and (not name.startswith('augment.') or name.endswith('.name'))]
  if missing:
    yield FieldError(missing[0], f'The config has no {", ".join(missing[:5])}'
                     f'{" ..." * (len(missing) > 5)}. It must have all fields of `fields.base()`.')
  for name in values:
    if name not in names and name not in sections and not is_open(name):
      yield FieldError(name, f'Unknown config field {name!r}.{nearest(name, names)} '
                       'python main.py --help lists all fields.')


def check_values(config: ConfigDict) -> Iterator[FieldError]:
  """Yields each value that its row does not allow, and each path that can be none."""
  values = dict(leaves(config))
  for name in sorted(values, key=lambda name: _ORDER.get(name, len(_ORDER))):
    value, row = values[name], BY_NAME.get(name)
    if row is None or isinstance(value, ConfigDict):
      yield from _check_json(name, value)
    elif error := row.error(value):
      yield FieldError(name, error)
    elif 'path' in row.flags and value is not None and not value.startswith(_NO_PATHS):
      yield from caught(name, expand_path, value.partition('#')[0] or value, name)


def leaves(section: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the dotted names and values of all fields and sections."""
  for name, value in section.items():
    yield prefix + name, value
    if isinstance(value, ConfigDict):
      yield from leaves(value, f'{prefix}{name}.')


def _check_json(name: str, value: Any) -> Iterator[FieldError]:
  """A value without a row can be written as JSON."""
  if not isinstance(value, ConfigDict):
    try:
      json.dumps(value)
    except TypeError:
      yield wrong_value(name, value, f'a value that JSON can hold, not a {type(value).__name__}.')
