"""Errors of Orbax and of the disk as one line each."""

import contextlib
import re
from collections.abc import Iterator

# Errors that say nothing about the file: it may be whole, and readable later.
_TRANSIENT = re.compile(
    r'RESOURCE_EXHAUSTED|[Oo]ut of memory|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED'
    r'|\b(EIO|ESTALE|EACCES|EPERM|EMFILE|ENFILE|ENOMEM|ETIMEDOUT|EAGAIN)\b|Permission denied'
    r'|Too many open files|Input/output error|Stale file handle')


class DamagedError(ValueError):
  """A checkpoint cannot be read, or differs from the saved one."""


@contextlib.contextmanager
def storage_errors(
    action: str, error_type: type[ValueError] = ValueError, advice: str = '') -> Iterator[None]:
  """Turns any error within into 'Cannot <action>: <reason>. <advice>', a ValueError of one line.

  It is of type `error_type`, unless the error is transient.
  """
  try:
    yield
  except Exception as error:
    text = f'Cannot {action}: {short_reason(error)}'
    text = f'{text.rstrip(".")}. {advice}' if advice else text
    raise (ValueError if is_transient(error) else error_type)(text) from error


def is_transient(error: Exception) -> bool:
  """Returns whether memory, permissions or a connection failed, rather than the file."""
  transient_types = (MemoryError, PermissionError, TimeoutError)
  return isinstance(error, transient_types) or bool(_TRANSIENT.search(str(error)))


def short_reason(error: Exception) -> str:
  """Returns the first line of an error, without the details that TensorStore adds in brackets."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  line = re.split(r" \[\w+(\[\d+\])?='", lines[0] if lines else type(error).__name__, maxsplit=1)[0]
  # The reason of the system comes last.
  return line if len(line) <= 300 else f'{line[:80]} ... {line[-200:]}'
