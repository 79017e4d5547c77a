"""Why a file is not read, in a text that is safe to print whatever the file holds."""

from collections.abc import Iterable
from typing import Any

from dfkd_jax.texts import printable

_NAME, _DETAIL = 80, 1000  # Characters of what is shown of a name, and of all that is said of a file.


class RefusedError(ValueError):
  """The file is not, or not only, a set of weights that we read; the text goes on after 'it '."""


def shown(value: Any) -> str:
  """What a file calls something, for a message: cut off, and without characters that steer a terminal.

  Args:
    value: Of the file. Text and numbers are shown; of anything else, which may take forever to show, only its type.
  """
  if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to print the longest.
    return f'a number of {value.bit_length()} bits'
  if not isinstance(value, (str, bytes, int, float, type(None))):
    return f'a {type(value).__name__}'
  text = value[:_NAME + 1] if isinstance(value, (str, bytes)) else value
  escaped = repr(text)[1:-1] if isinstance(text, str) else repr(text)
  return escaped if len(escaped) <= _NAME else f'{escaped[:_NAME - 3]}...'


def some(values: Iterable[Any], most: int = 5) -> list[str]:
  """The first of the names that a file has, in order, for a message."""
  return sorted(map(shown, values))[:most]


def line(error: Any) -> str:
  """What an error says, in one line that is cut off, and without characters that steer a terminal; '' if nothing."""
  text = printable(str(error)[:20 * _DETAIL])
  return text if len(text) <= _DETAIL else f'{text[:_DETAIL - 3]}...'
