"""Errors and their wording: misspelt names, and text from files that is safe to print."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any


class RefusedError(ValueError):
  """A file that holds no weights, or more than weights. Its message follows the words 'it '."""


class FieldError(ValueError):
  """A value that is not allowed, of `field`: an argument, or a dotted name in the config."""

  def __init__(self, field: str, message: str):
    self.field = field
    super().__init__(message)


@contextlib.contextmanager
def explain_read_errors(path: str | os.PathLike) -> Iterator[None]:
  """Turns anything that a bad file at `path` raises into a ValueError of one line."""
  try:
    yield
  except RefusedError as error:
    raise ValueError(f'Refused to read {path}: it {one_line(error)}.') from None
  except Exception as error:  # A damaged file may raise anything.
    detail = one_line(error) or type(error).__name__
    raise ValueError(f'Could not read {path}: it is truncated or damaged ({detail}).') from error


@contextlib.contextmanager
def reporting_read_errors(name: str) -> Iterator[None]:
  """Turns any error of the block into a ValueError of one line: "<name> cannot be read: ..."."""
  try:
    yield
  except Exception as error:  # Readers of damaged files raise errors of many types.
    reason = re.sub(r' <_io\.BytesIO.*?>', '', str(error)) or type(error).__name__
    raise ValueError(f'{name} cannot be read: {one_line(reason)}') from error


def check_choice(name: str, allowed: Iterable[str], what: str) -> str:
  """Returns the name; raises a ValueError that lists all names if it is not allowed."""
  allowed = tuple(allowed)
  if name not in allowed:
    raise ValueError(
        f'Unknown {what} {name!r}.{nearest(name, allowed)} Known: {", ".join(allowed)}.')
  return name


def check_option(field: str, value: object, options: tuple) -> None:
  """Raises a FieldError unless the value is one of the options."""
  if value not in options:
    raise FieldError(field, f'{field} is {value!r}, must be one of {options}.')


def nearest(name: str, allowed: Iterable[str]) -> str:
  """Suggests the allowed name that is most similar: ' Did you mean ...?', or '' if none is."""
  similar = difflib.get_close_matches(name, list(allowed), 1)
  return f' Did you mean {similar[0]!r}?' if similar else ''


def one_line(message: Any, most: int = 1000) -> str:
  """Writes a message as one line of about `most` characters; escapes terminal controls."""
  text = _shorten(' '.join(str(message).split()), most)
  return _shorten(''.join(c if c.isprintable() else repr(c)[1:-1] for c in text), most)


def short_repr(value: object, most: int = 100) -> str:
  """Writes a value as Python does; cuts the middle out beyond `most` characters."""
  return _shorten(repr(value), most)


def safe_name(value: Any) -> str:
  """Writes text or a number from a file as one short line, and of other objects the type only."""
  if not isinstance(value, (str, bytes, int, float, type(None))):
    return f'a {type(value).__name__}'
  return one_line(value if isinstance(value, str) else repr(value), most=80)


def safe_names(values: Iterable[Any], most: int = 5) -> list[str]:
  """Writes the first `most` names from a file, in alphabetical order."""
  return sorted(map(safe_name, values))[:most]


def _shorten(text: str, most: int) -> str:
  return text if len(text) <= most else f'{text[:most // 2]} ... {text[-most // 2:]}'
