"""What Orbax and the disk have to say of a checkpoint: in one line, and nothing beside it."""

import logging
import os
import re
import sys
import tempfile
import types

from dfkd_jax import parallel

# What says nothing of the file: it may be whole, and read another time.
_PASSING = re.compile(
    r'RESOURCE_EXHAUSTED|[Oo]ut of memory|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED'
    r'|\b(EIO|ESTALE|EACCES|EPERM|EMFILE|ENFILE|ENOMEM|ETIMEDOUT|EAGAIN)\b|Permission denied|Too many open files'
    r'|Input/output error|Stale file handle')
_ORBAX = f'{os.sep}orbax{os.sep}checkpoint{os.sep}'
# A status of TensorStore, or what was to be opened.
_TENSORSTORE = re.compile(
    'ABORTED: |ALREADY_EXISTS: |CANCELLED: |DATA_LOSS: |DEADLINE_EXCEEDED: |FAILED_PRECONDITION: |INTERNAL: '
    '|INVALID_ARGUMENT: |NOT_FOUND: |OUT_OF_RANGE: |PERMISSION_DENIED: |RESOURCE_EXHAUSTED: |UNAUTHENTICATED: '
    r'|UNAVAILABLE: |UNIMPLEMENTED: |UNKNOWN: |.*\[tensorstore_spec=', re.DOTALL)


def is_transient(error: Exception) -> bool:
  """Whether a read failed for lack of memory, rights or a connection, which is no damage to what was to be read."""
  return isinstance(error, (MemoryError, PermissionError, TimeoutError)) or bool(_PASSING.search(str(error)))


def reason(error: Exception) -> str:
  """First line of an error, less the internals that TensorStore appends in brackets."""
  line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
  line = re.split(r" \[\w+(\[\d+\])?='", line, maxsplit=1)[0]
  return line if len(line) <= 300 else f'{line[:80]} ... {line[-200:]}'  # What the system says comes last.


def silence_orbax() -> None:
  """Drops Orbax's log, of which all that matters is raised too, and late echoes of a read or write that has failed."""
  logger, report, of_orbax = logging.getLogger('absl'), sys.unraisablehook, _is_of_orbax
  if _not_orbax in logger.filters:
    return
  logger.addFilter(_not_orbax)
  logging.getLogger('asyncio').addFilter(_not_echo)

  def hook(unraisable):  # Without globals, which may be gone when the process ends.
    if of_orbax(unraisable.exc_traceback):  # A coroutine that was thrown away while it waited.
      return
    if str(unraisable.exc_value) != 'Event loop is closed':  # Orbax closes it while TensorStore still calls back.
      report(unraisable)

  sys.unraisablehook = hook


def _is_of_orbax(place: types.TracebackType | None, orbax: str = _ORBAX) -> bool:
  """Whether an error came by a function of Orbax's."""
  while place:
    if orbax in place.tb_frame.f_code.co_filename:
      return True
    place = place.tb_next
  return False


def _not_echo(record: logging.LogRecord) -> bool:
  """Not of a read or write that has failed already, whose other parts nobody waits for."""
  error = record.exc_info[1] if record.exc_info else None
  if error is None or 'was never retrieved' not in record.getMessage():
    return True
  if error.__traceback__ is None:  # As TensorStore's own errors are.
    return not (type(error) is ValueError and _TENSORSTORE.match(str(error)))
  return not _is_of_orbax(error.__traceback__)


def _not_orbax(record: logging.LogRecord) -> bool:
  return _ORBAX not in record.pathname


def check_directory(directory: str, read_only: bool) -> None:
  """Makes a folder that all processes see, and tries to write there; or only looks whether it is there.

  Raises:
    ValueError: It is not.
  """
  if read_only:
    if not os.path.isdir(directory):
      raise ValueError(f'There is no folder {directory}.')
    return
  with parallel.raise_on_all_processes():
    try:
      os.makedirs(directory, exist_ok=True)
      with tempfile.TemporaryFile(dir=directory):
        pass
    except OSError as error:
      raise ValueError(f'Cannot write to {directory}: {error.strerror}.') from error
  parallel.check_shared_folder(directory)
