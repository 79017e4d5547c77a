"""Sets fields of a config by `--config.FIELD=VALUE`."""

import ast
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from dfkd_jax.config.fields import BY_NAME, is_open
from dfkd_jax.messages import nearest, short_repr

_FLAG = re.compile(r'--?(no)?config\.([\w.]+)((?:\[\d+\])*)')
_FLAGS = {'true': True, 't': True, '1': True, 'false': False, 'f': False, '0': False}
_TYPES = {int: 'a whole number', float: 'a number', bool: 'True or False',
          tuple: "a tuple such as '(1, 2)'"}


def override(config: ConfigDict, arguments: Sequence[str]) -> None:
  """Sets fields by arguments such as '--config.seed=1', '--config.control' and '--config.x', '3'.

  Raises:
    ValueError: There is no such field, or it cannot have the value.
  """
  arguments = list(arguments)
  while arguments:
    flag, has_value, value = arguments.pop(0).partition('=')
    match = _FLAG.fullmatch(flag)
    if not match:
      hint = nearest(flag, ['--config', '--workdir']) if flag.startswith('-') else ''
      raise ValueError(f'Unknown argument {flag!r}.{hint} See --help.')
    negated, field, index = match.groups()
    _check_field(config, field, index)
    section, _, name = field.rpartition('.')
    section = _get(config, section) if section else config
    kind = _kind(section, field, name)
    if kind is bool and not has_value:
      value = str(not negated)
    elif negated or not (has_value or arguments):
      raise ValueError(f'config.{field} needs a value: {flag}=VALUE.')
    elif not has_value:
      value = arguments.pop(0)
    with section.unlocked(), section.ignore_type():
      section[name] = _parse(field, kind, value)


def _get(config: ConfigDict, field: str) -> Any:
  """Returns a field or section by its dotted name, or None."""
  for name in field.split('.'):
    config = config.get(name) if isinstance(config, ConfigDict) else None
  return config


def _check_field(config: ConfigDict, field: str, index: str) -> None:
  """Raises ValueError unless a flag may set the field."""
  known = field_names(config)
  section = field.rpartition('.')[0]
  if field in known:
    if index:
      raise ValueError(f'config.{field}{index} is set, must be the whole tuple: '
                       f'--config.{field}=(...).')
    if isinstance(_get(config, field), ConfigDict):
      raise ValueError(f'config.{field} is a section; set one of its fields.')
    return
  if section.endswith('.options') and section in known:
    return  # the network knows its own options
  while section and section not in known:
    section = section.rpartition('.')[0]
  there = [name for name in known if name.rpartition('.')[0] == section]
  raise ValueError(
      f'Unknown config field {field!r}.{nearest(field, known)} '
      f'{f"config.{section}" if section else "config"} has: {", ".join(there) or "no fields"}.')


def field_names(section: ConfigDict, prefix: str = '') -> list[str]:
  """Returns the dotted names of all fields and sections."""
  names = []
  for name, value in section.items():
    names.append(prefix + name)
    if isinstance(value, ConfigDict):
      names += field_names(value, f'{prefix}{name}.')
  return names


def _kind(section: ConfigDict, field: str, name: str) -> type | None:
  """Returns the type of a field; None: any, for an option without a row or a value."""
  if row := BY_NAME.get(field):
    return row.kind if row.length is None else tuple
  return section.get_type(name) if name in section else None


def _parse(field: str, kind: type | None, text: str) -> Any:
  """Reads a value of a type; 'None' is None where that is allowed."""
  if text == 'None' and (BY_NAME[field].allows_none if field in BY_NAME else is_open(field)):
    return None
  try:
    if kind is bool:
      return _FLAGS[text.lower()]
    if kind is int:
      return int(text, 0)
    if kind in (str, float):
      return kind(text)
    value = ast.literal_eval(text)
    if kind is tuple and value is None:
      raise ValueError
  except (ValueError, SyntaxError, LookupError, MemoryError, RecursionError) as error:
    if kind is None:
      return text
    raise ValueError(f'config.{field} is {short_repr(text)}, must be '
                     f'{_TYPES.get(kind, "as the config has it")}.') from error
  return value if kind is None or isinstance(value, tuple) else (value,)
