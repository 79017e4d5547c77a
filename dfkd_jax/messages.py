"""Texts for people: errors that carry their field, names that may be misspelt, text that is safe to print."""

import difflib
from collections.abc import Iterable
from typing import Any

_NAME, _DETAIL = 80, 1000  # Characters of what is shown of a name, and of all that is said of a file.


class RefusedError(ValueError):
  """The file is not, or not only, a set of weights that we read; the text goes on after 'it '."""


def safe_name(value: Any) -> str:
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


def safe_names(values: Iterable[Any], most: int = 5) -> list[str]:
  """The first of the names that a file has, in order, for a message."""
  return sorted(map(safe_name, values))[:most]


def first_line(error: Any) -> str:
  """What an error says, in one line that is cut off, and without characters that steer a terminal; '' if nothing."""
  text = printable(str(error)[:20 * _DETAIL])
  return text if len(text) <= _DETAIL else f'{text[:_DETAIL - 3]}...'


def nearest(name: str, allowed: Iterable[str]) -> str:
  """' Did you mean ...?' with the nearest name that is allowed, or nothing if none is near."""
  near = difflib.get_close_matches(name, list(allowed), 1)
  return f' Did you mean {near[0]!r}?' if near else ''


def check_choice(name: str, allowed: Iterable[str], what: str) -> str:
  """The name, if it is allowed.

  Raises:
    ValueError: It is not; names it, the nearest that is, and all.
  """
  allowed = tuple(allowed)
  if name not in allowed:
    raise ValueError(f'Unknown {what} {name!r}.{nearest(name, allowed)} Known: {", ".join(allowed)}.')
  return name


def printable(text: str) -> str:
  """One line that does nothing to a terminal: characters that would steer it are written out."""
  return ''.join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in ' '.join(text.split()))


def truncate(text: str, most: int) -> str:
  """The text, or its beginning and end."""
  return text if len(text) <= most else f'{text[:most // 2]} ... {text[-most // 2:]}'


def short_repr(value: object, most: int = 100) -> str:
  """The value as Python writes it, cut."""
  return truncate(repr(value), most)


class FieldError(ValueError):
  """A value that is not allowed.

  Attributes:
    field: Name of the argument, or dotted name of the config field, that has it.
  """

  def __init__(self, field: str, message: str):
    self.field = field
    super().__init__(message)


def check_option(field: str, value: object, options: tuple) -> None:
  """Raises a FieldError unless the value is one of the options."""
  if value not in options:
    raise FieldError(field, f'{field} is {value!r}, must be one of {options}.')
