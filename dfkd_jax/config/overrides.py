"""Sets fields of a config by `--config.FIELD=VALUE`."""

import ast
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from dfkd_jax.config.fields import BY_NAME, leaves
from dfkd_jax.messages import nearest

_FLAG = re.compile(r'--?(no)?config\.([\w.]+)')
_BOOLS = {'true': True, 't': True, '1': True, 'false': False, 'f': False, '0': False}
_PARSERS = {str: str, float: float, int: lambda text: int(text, 0),
            bool: lambda text: _BOOLS[text.lower()]}


def override(config: ConfigDict, arguments: Sequence[str]) -> None:
  """Sets fields by arguments such as '--config.seed=1', '--config.control' and '--config.x', '3'.

  Raises a ValueError if there is no such field. A text that is no value of its type stays a text,
  which the checks refuse.
  """
  arguments = list(arguments)
  while arguments:
    flag, has_value, value = arguments.pop(0).partition('=')
    match = _FLAG.fullmatch(flag)
    if not match:
      hint = nearest(flag, ['--config', '--workdir']) if flag.startswith('-') else ''
      raise ValueError(f'Unknown argument {flag!r}.{hint} See --help.')
    negated, field = match.groups()
    section, kind = _find(config, field)
    if kind is bool and not has_value:
      value = str(not negated)
    elif negated or not (has_value or arguments):
      raise ValueError(f'config.{field} needs a value: --config.{field}=VALUE.')
    elif not has_value:
      value = arguments.pop(0)
    with section.unlocked(), section.ignore_type():
      section[field.rpartition('.')[2]] = _parse(kind, value)


def _find(config: ConfigDict, field: str) -> tuple[ConfigDict, type | None]:
  """Returns the section of a field and its type; None: any, for an option without a value."""
  known = {'': config, **dict(leaves(config))}
  section, _, name = field.rpartition('.')
  if isinstance(known.get(field), ConfigDict):
    raise ValueError(f'config.{field} is a section; set one of its fields.')
  if field not in known and not (section.endswith('.options') and section in known):
    raise ValueError(f'Unknown config field {field!r}.{nearest(field, known)} '
                     'python main.py --help lists all fields.')
  if row := BY_NAME.get(field):
    return known[section], row.kind if row.length is None else tuple
  return known[section], known[section].get_type(name) if field in known else None


def _parse(kind: type | None, text: str) -> Any:
  if text == 'None':
    return None
  try:
    value = _PARSERS.get(kind, ast.literal_eval)(text)
  except (ValueError, SyntaxError, LookupError, MemoryError, RecursionError):
    return text
  return (value,) if kind is tuple and not isinstance(value, tuple) else value
