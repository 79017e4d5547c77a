"""Names that a user may misspell."""

import difflib
from collections.abc import Iterable


def nearest(name: str, allowed: Iterable[str]) -> str:
  """' Did you mean ...?' with the nearest name that is allowed, or nothing if none is near."""
  near = difflib.get_close_matches(name, list(allowed), 1)
  return f' Did you mean {near[0]!r}?' if near else ''


def known(name: str, allowed: Iterable[str], what: str) -> str:
  """The name, if it is allowed.

  Raises:
    ValueError: It is not; names it, the nearest that is, and all.
  """
  allowed = tuple(allowed)
  if name not in allowed:
    raise ValueError(f'Unknown {what} {name!r}.{nearest(name, allowed)} Known: {", ".join(allowed)}.')
  return name
