"""Paths that a user gives, checked before anything is read."""

import os
import pathlib
import stat

from dfkd_jax.messages import short_repr

_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # Bytes, on the usual systems.
_KINDS = {
    stat.S_ISFIFO: 'a pipe', stat.S_ISSOCK: 'a socket', stat.S_ISCHR: 'a device',
    stat.S_ISBLK: 'a device'}


def expand_path(path: str | os.PathLike, field: str = 'path') -> pathlib.Path:
  """Expands '~' in a path, and checks that a file or folder could lie there.

  Args:
    path: Given by the user.
    field: Name of the argument or config field, for errors.

  Raises:
    ValueError: No file can have this path, or it is a pipe, a socket or a device. Reading one of
      these would never end.
  """
  text = os.fspath(path)
  what = f'{field} is {short_repr(text)}'
  if not text or '\0' in text:
    raise ValueError(f'{what}, must be a path.')
  try:
    expanded = pathlib.Path(text).expanduser()
    encoded = os.fsencode(expanded)
  except (RuntimeError, UnicodeError) as error:
    raise ValueError(f'{what}, must be a path: {error}') from error
  longest = max(map(len, encoded.split(b'/')))
  if longest > _LONGEST_NAME:
    raise ValueError(
        f'{what}, must have names of at most {_LONGEST_NAME} bytes, not {longest}.')
  if len(encoded) > _LONGEST_PATH:
    raise ValueError(f'{what}, must have at most {_LONGEST_PATH} bytes, not {len(encoded)}.')
  if kind := special_kind(expanded):
    raise ValueError(f'{what}, must be a file or a folder: it is {kind}.')
  return expanded


def special_kind(path: str | os.PathLike) -> str | None:
  """Names the kind of a pipe, socket or device; None for files, folders and missing paths."""
  try:
    mode = os.stat(path).st_mode
  except OSError:
    return None
  return next((kind for is_kind, kind in _KINDS.items() if is_kind(mode)), None)
