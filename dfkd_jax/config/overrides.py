"""Sets fields of a config by `--config.FIELD=VALUE`."""

import ast
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from dfkd_jax.config.fields import BY_NAME, is_open
from dfkd_jax.config.values import leaves
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
    section, kind = _find(config, field, index)
    if kind is bool and not has_value:
      value = str(not negated)
    elif negated or not (has_value or arguments):
      raise ValueError(f'config.{field} needs a value: --config.{field}=VALUE.')
    elif not has_value:
      value = arguments.pop(0)
    with section.unlocked(), section.ignore_type():
      section[field.rpartition('.')[2]] = _parse(field, kind, value)


def _find(config: ConfigDict, field: str, index: str) -> tuple[ConfigDict, type | None]:
  """Returns the section of a field and its type; None: any, for an option without a value.

  Raises:
    ValueError: There is no such field, it is a section, or the flag sets a part of a tuple.
  """
  known = {'': config, **dict(leaves(config))}
  section, _, name = field.rpartition('.')
  if index:
    raise ValueError(f'config.{field}{index} is set, must be the whole tuple: '
                     f'--config.{field}=(...).')
  if isinstance(known.get(field), ConfigDict):
    raise ValueError(f'config.{field} is a section; set one of its fields.')
  if field not in known and not (section.endswith('.options') and section in known):
    while section not in known:
      section = section.rpartition('.')[0]
    siblings = [name for name in known if name and name.rpartition('.')[0] == section]
    raise ValueError(
        f'Unknown config field {field!r}.{nearest(field, known)} '
        f'config{section and f".{section}"} has: {", ".join(siblings) or "no fields"}.')
  if row := BY_NAME.get(field):
    return known[section], row.kind if row.length is None else tuple
  return known[section], known[section].get_type(name) if field in known else None


def _parse(field: str, kind: type | None, text: str) -> Any:
  """Reads a value of a type; 'None' is None where that is allowed."""
  if text == 'None' and (BY_NAME[field].allows_none if field in BY_NAME else is_open(field)):
    return None
  try:
    if kind is bool:
      return _FLAGS[text.lower()]
    if kind in (str, int, float):
      return int(text, 0) if kind is int else kind(text)
    value = ast.literal_eval(text)
    if kind is None or isinstance(value, tuple):
      return value
    return (value,) if value is not None else _FLAGS[text]
  except (ValueError, SyntaxError, LookupError, MemoryError, RecursionError) as error:
    if kind is None:
      return text
    raise ValueError(f'config.{field} is {short_repr(text)}, must be {_TYPES[kind]}.') from error
