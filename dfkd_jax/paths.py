"""Paths that a user gives, checked before anything is read."""

import errno
import os
import pathlib
import stat

from dfkd_jax.messages import short_repr

_KINDS = {stat.S_IFIFO: 'a pipe', stat.S_IFSOCK: 'a socket', stat.S_IFCHR: 'a device',
          stat.S_IFBLK: 'a device'}


def expand_path(path: str | os.PathLike, field: str = 'path') -> pathlib.Path:
  """Expands '~' in a path; `field` names the argument or config field, for errors.

  Raises a ValueError if no file can have this path, or it is a pipe, a socket or a device, which
  would be read without end.
  """
  text = os.fspath(path)
  what = f'{field} is {short_repr(text)}, must be'
  if not text:
    raise ValueError(f'{what} a path.')
  try:
    expanded = pathlib.Path(text).expanduser()
    if any(len(os.fsencode(part)) > 255 for part in expanded.parts):  # Also below a missing folder.
      raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    kind = _KINDS.get(stat.S_IFMT(expanded.stat().st_mode))
  except (OSError, RuntimeError, ValueError) as error:
    if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
      return expanded  # a missing path, or one that cannot be reached
    raise ValueError(f'{what} a path: {getattr(error, "strerror", error)}') from error
  if kind:
    raise ValueError(f'{what} a file or a folder: it is {kind}.')
  return expanded
