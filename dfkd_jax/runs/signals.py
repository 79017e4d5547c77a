"""How a run is asked to end early: by a signal, or by what it may spend."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

NAMES = ('SIGTERM', 'SIGINT')


class Stopped(Exception):  # noqa: N818 (no error: the run is in order, and goes on another time)
  """A run has ended before its last round, saved.

  Args:
    summary: What `train.run` returns instead of a whole run's: 'stopped' by what, 'done' and 'total' rounds, and so on.
  """

  def __init__(self, summary: dict[str, Any]):
    self.summary = summary
    super().__init__(summary['stopped'])


class Interrupted(KeyboardInterrupt):
  """A signal came while there was nothing to save yet.

  Args:
    name: Of the signal, one of NAMES.
  """

  def __init__(self, name: str):
    self.name = name
    super().__init__(name)


class StopRequest:
  """Which signal came; called, its name, None if none did.

  Attributes:
    at_once: Whether a signal raises `Interrupted` where it comes; else it is only noted. A process that others wait
      for must note it, and so must one that has something to save.
  """

  def __init__(self):
    self.at_once = True
    self._came: str | None = None
    self._before: dict[str, Any] = {}  # Handlers.

  def __call__(self) -> str | None:
    """Its name, None if none came."""
    return self._came

  def again(self) -> None:
    """Listens, if it does, also where a library has begun to listen itself, as JAX does in one of several processes."""
    for name in self._before:
      signal.signal(getattr(signal, name), self._note)

  def _begin(self) -> None:
    before = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
    self._before = {name: handler for name, handler in before.items() if handler != signal.SIG_IGN}
    self.again()

  def _end(self) -> None:
    for name, handler in self._before.items():
      signal.signal(getattr(signal, name), signal.SIG_DFL if handler is None else handler)
    self._before = {}

  def _note(self, number: int, frame: Any) -> None:
    self._came = signal.Signals(number).name
    self._end()
    if self.at_once:
      raise Interrupted(self._came)


@contextlib.contextmanager
def signals(listen: bool = True) -> Iterator[StopRequest]:
  """Within, the first SIGTERM or SIGINT is as `Asked` has it; a second one does what it did before.

  One that is ignored stays so: shells start what goes to the background like that.

  Args:
    listen: Whether to; also not where Python would not allow it, on threads other than the main one.
  """
  asked = StopRequest()
  if listen and threading.current_thread() is threading.main_thread():
    asked._begin()
  try:
    yield asked
  finally:
    asked._end()
