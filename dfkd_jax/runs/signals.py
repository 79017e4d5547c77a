"""Requests to end a run early, by SIGTERM or SIGINT."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

NAMES = ('SIGTERM', 'SIGINT')


class Stopped(Exception):  # noqa: N818 (not an error: the run is saved and can be resumed)
  """A run has ended early, and is saved; `summary` is the result of `train.run`."""

  def __init__(self, summary: dict[str, Any]):
    self.summary = summary
    super().__init__(summary['stopped'])


class Interrupted(KeyboardInterrupt):
  """A signal, one of NAMES, came before there was anything to save; its name is the text."""


class StopRequest:
  """The first signal that came; `signal` is its name, one of NAMES, or None if none came.

  A signal raises `Interrupted`. After `defer` it is only recorded: the run ends after its round.
  """

  def __init__(self):
    self.signal: str | None = None
    self._is_deferred = False
    self._handlers: dict[str, Any] = {}  # The former handlers, by signal.

  def defer(self) -> None:
    """Only records signals from now on: there is something to save, or other processes wait."""
    self._is_deferred = True

  def install_handlers(self) -> None:
    """Installs the handlers again, after a library such as JAX has installed its own."""
    for name in self._handlers:
      signal.signal(getattr(signal, name), self._handle)

  def _end(self) -> None:
    for name, old in self._handlers.items():
      signal.signal(getattr(signal, name), signal.SIG_DFL if old is None else old)
    self._handlers = {}

  def _handle(self, number: int, frame: Any) -> None:
    self.signal = signal.Signals(number).name
    self._end()
    if not self._is_deferred:
      raise Interrupted(self.signal)


@contextlib.contextmanager
def signals(listen: bool = True) -> Iterator[StopRequest]:
  """Handles the first SIGTERM or SIGINT within. A second one has its former effect.

  Handles none if `listen` is False, or outside the main thread, where Python forbids it.
  """
  request = StopRequest()
  if listen and threading.current_thread() is threading.main_thread():
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
    # Shells start background jobs with signals ignored. These stay ignored.
    request._handlers = {name: old for name, old in handlers.items() if old != signal.SIG_IGN}
    request.install_handlers()
  try:
    yield request
  finally:
    request._end()
