"""Paths that a user gives: whether anything could lie there, and whether what lies there can be read to its end."""

import os
import pathlib
import stat

from dfkd_jax.messages import short_repr

_LONGEST = 4095  # Bytes of a path, on the usual systems.
_LONGEST_NAME = 255  # Of a file or folder.
_KINDS = {stat.S_ISFIFO: 'a pipe', stat.S_ISSOCK: 'a socket', stat.S_ISCHR: 'a device', stat.S_ISBLK: 'a device'}


def expanded(path: str | os.PathLike, field: str = 'path') -> pathlib.Path:
  """A path with '~' for a home written out.

  Args:
    path: As the user gave it.
    field: That it was given for, for errors.

  Raises:
    ValueError: No file can have that path, or what lies there is neither file nor folder: to read a pipe or a device
      would never end.
  """
  text = os.fspath(path)
  what = f'{field} is {short_repr(text)}'
  if not text:
    raise ValueError(f'{what}, must be a path.')
  try:
    found = pathlib.Path(text).expanduser()
    encoded = os.fsencode(found)
  except (RuntimeError, UnicodeError) as error:
    raise ValueError(f'{what}, must be a path: {error}') from error
  if b'\0' in encoded:
    raise ValueError(f'{what}, must be a path.')
  longest = max(map(len, encoded.split(b'/')))
  if longest > _LONGEST_NAME:
    raise ValueError(f'{what}, must have names of at most {_LONGEST_NAME} bytes, not {longest}.')
  if len(encoded) > _LONGEST:
    raise ValueError(f'{what}, must have at most {_LONGEST} bytes, not {len(encoded)}.')
  if kind := special(found):
    raise ValueError(f'{what}, must be a file or a folder: it is {kind}.')
  return found


def special(path: str | os.PathLike) -> str | None:
  """What lies there, if it is neither a file nor a folder, in words; None also if it cannot be told."""
  try:
    mode = os.stat(path).st_mode
  except OSError:
    return None
  return next((kind for is_kind, kind in _KINDS.items() if is_kind(mode)), None)
