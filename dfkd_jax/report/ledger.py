"""Where the time of a run goes, and what it has done."""

import contextlib
import time
from collections.abc import Callable, Iterator

from dfkd_jax.messages import check_choice

PARTS = ('setup', 'preflight', 'compile', 'synthesis', 'student', 'control', 'evaluation', 'checkpoint')
COUNTS = (
    'starts',  # of processes that went on with the run, the first included
    'synthesised',  # images
    'seen',  # images, by the student
    'reseeded')  # rounds that were done again with other keys, after a number that was not finite


class Ledger:
  """Seconds by part of a run, and counts.

  A part inside another stops the outer one's clock, so nothing is counted twice.

  Args:
    clock: Returns seconds; only differences matter.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._seconds = dict.fromkeys(PARTS, 0.0)
    self._counts = dict.fromkeys(COUNTS, 0)
    self._open: list[str] = []
    self._since = 0.0

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Counts the block's time to one of PARTS, also if the block raises.

    Raises:
      ValueError: There is no such part.
    """
    check_choice(name, PARTS, 'part of a run')
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
    check_choice(name, PARTS, 'part of a run')
    self._seconds[name] += float(seconds)

  def count(self, name: str, number: int = 1) -> None:
    """Adds to one of COUNTS.

    Raises:
      ValueError: There is no such count.
    """
    self._counts[check_choice(name, COUNTS, 'count of a run')] += int(number)

  def counts(self) -> dict[str, int]:
    """All counts so far, in the order of COUNTS."""
    return dict(self._counts)

  def seconds(self) -> dict[str, float]:
    """Seconds of every part so far, in the order of PARTS."""
    self._settle()
    return dict(self._seconds)

  def state(self) -> dict[str, dict[str, float]]:
    """What `load` takes, as JSON values for a checkpoint."""
    return {'seconds': self.seconds(), 'counts': self.counts()}

  def load(self, state: dict[str, dict[str, float]], but: dict[str, dict[str, float]] | None = None) -> None:
    """Adds the seconds and counts of the run that is gone on with to those of this process.

    Args:
      state: As `state` gave it.
      but: What is not to be added, since it was before.

    Raises:
      ValueError: There is no such part or count.
    """
    before = but or {'seconds': {}, 'counts': {}}
    for name, seconds in state['seconds'].items():
      self.add(name, seconds - before['seconds'].get(name, 0.0))
    for name, number in state['counts'].items():
      self.count(name, number - before['counts'].get(name, 0))

  def _settle(self) -> None:
    now = self._clock()
    if self._open:
      self._seconds[self._open[-1]] += now - self._since
    self._since = now
