"""How a run is asked to end early: by a signal, or by what it may spend."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

NAMES = ('SIGTERM', 'SIGINT')
Asked = Callable[[], str | None]  # The name of the signal that came, if one did.


class Stopped(Exception):  # noqa: N818 (no error: the run is in order, and goes on another time)
  """A run has ended before its last round, saved.

  Args:
    summary: What `train.run` returns instead of a whole run's: 'stopped' by what, 'done' and 'total' rounds, and so on.
  """

  def __init__(self, summary: dict[str, Any]):
    self.summary = summary
    super().__init__(summary['stopped'])


@contextlib.contextmanager
def signals(listen: bool = True) -> Iterator[Asked]:
  """Within, the first SIGTERM or SIGINT is only noted; a second one does what it did before.

  One that is ignored stays so: shells start what goes to the background like that.

  Args:
    listen: Whether to; also not where Python would not allow it, on threads other than the main one.
  """
  came: list[str] = []
  if not listen or threading.current_thread() is not threading.main_thread():
    yield lambda: None
    return
  before = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
  before = {name: handler for name, handler in before.items() if handler != signal.SIG_IGN}

  def note(number, frame):
    came.append(signal.Signals(number).name)
    restore()

  def restore():
    for name, handler in before.items():
      signal.signal(getattr(signal, name), signal.SIG_DFL if handler is None else handler)

  for name in before:
    signal.signal(getattr(signal, name), note)
  try:
    yield lambda: came[0] if came else None
  finally:
    restore()
