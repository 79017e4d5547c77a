"""Counts the time that a run spends in its parts, and the work it has done."""

import contextlib
import time
from collections.abc import Callable, Iterator

from dfkd_jax.messages import check_choice

PARTS = ('setup', 'preflight', 'compile', 'synthesis', 'student', 'control', 'evaluation',
         'checkpoint')
# Processes of the run, images made, images seen by the student, and rounds repeated with other
# keys after a number that was not finite.
COUNTS = ('starts', 'synthesised', 'seen', 'reseeded')


class Ledger:
  """Seconds by part of a run, and counts.

  A part inside another stops the clock of the outer part, so no second is counted twice.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._seconds = dict.fromkeys(PARTS, 0.0)
    self._counts = dict.fromkeys(COUNTS, 0)
    self._open: list[str] = []
    self._since = 0.0

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Counts the block's time to one of PARTS, also if the block raises."""
    check_choice(name, PARTS, 'part of a run')
    self._settle()
    self._open.append(name)
    try:
      yield
    finally:
      self._settle()
      self._open.pop()

  def add(self, name: str, seconds: float) -> None:
    """Adds seconds, measured elsewhere, to one of PARTS."""
    self._seconds[check_choice(name, PARTS, 'part of a run')] += float(seconds)

  def count(self, name: str, number: int = 1) -> None:
    """Adds to one of COUNTS."""
    self._counts[check_choice(name, COUNTS, 'count of a run')] += int(number)

  def counts(self) -> dict[str, int]:
    """Returns all counts, in the order of COUNTS."""
    return dict(self._counts)

  def seconds(self) -> dict[str, float]:
    """Returns the seconds of every part, in the order of PARTS."""
    self._settle()
    return dict(self._seconds)

  def state(self) -> dict[str, dict]:
    """Returns JSON values for a checkpoint; `load` takes them."""
    return {'seconds': self.seconds(), 'counts': self.counts()}

  def load(self, state: dict[str, dict], but: dict[str, dict] | None = None) -> None:
    """Adds the `state` of an earlier process, minus the state `but`, to this ledger."""
    before = but or {'seconds': {}, 'counts': {}}
    for name, seconds in state['seconds'].items():
      self.add(name, seconds - before['seconds'].get(name, 0.0))
    for name, number in state['counts'].items():
      self.count(name, number - before['counts'].get(name, 0))

  def _settle(self) -> None:
    """Counts the time since the last call to the innermost open part."""
    now = self._clock()
    if self._open:
      self._seconds[self._open[-1]] += now - self._since
    self._since = now
