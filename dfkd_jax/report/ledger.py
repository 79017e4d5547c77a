"""Where the time of a run goes."""

import contextlib
import time
from collections.abc import Callable, Iterator

from dfkd_jax.names import known

PARTS = ('setup', 'preflight', 'compile', 'synthesis', 'student', 'control', 'evaluation', 'checkpoint')


class Ledger:
  """Seconds by part of a run; a part inside another stops the outer one's clock, so nothing is counted twice.

  Args:
    clock: Returns seconds; only differences matter.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._seconds = dict.fromkeys(PARTS, 0.0)
    self._open: list[str] = []
    self._since = 0.0

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Counts the block's time to one of PARTS, also if the block raises.

    Raises:
      ValueError: There is no such part.
    """
    _check(name)
    self._settle()
    self._open.append(name)
    try:
      yield
    finally:
      self._settle()
      self._open.pop()

  def add(self, name: str, seconds: float) -> None:
    """Counts seconds that were measured elsewhere.

    Raises:
      ValueError: There is no such part.
    """
    _check(name)
    self._seconds[name] += float(seconds)

  def seconds(self) -> dict[str, float]:
    """Seconds of every part so far, in the order of PARTS."""
    self._settle()
    return dict(self._seconds)

  def state(self) -> dict[str, dict[str, float]]:
    """What `load` takes, as JSON values for a checkpoint."""
    return {'seconds': self.seconds()}

  def load(self, state: dict[str, dict[str, float]]) -> None:
    """Adds the seconds of the run that is gone on with to those of this process.

    Raises:
      ValueError: There is no such part.
    """
    for name, seconds in state['seconds'].items():
      self.add(name, seconds)

  def _settle(self) -> None:
    now = self._clock()
    if self._open:
      self._seconds[self._open[-1]] += now - self._since
    self._since = now


def _check(name: str) -> None:
  known(name, PARTS, 'part of a run')
