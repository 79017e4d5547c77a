"""The resources of a run: time by part, work done, versions of packages, devices."""

import contextlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator

import jax

import dfkd_jax
from dfkd_jax.messages import check_choice

PARTS = ('setup', 'preflight', 'compile', 'synthesis', 'student', 'head', 'control', 'evaluation',
         'checkpoint')
# Processes of the run, images made, images seen by the student, and rounds repeated with other
# keys after a number that was not finite.
COUNTS = ('starts', 'synthesised', 'seen', 'reseeded')
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


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


def versions() -> dict[str, str]:
  """Returns the versions of Python, of this library and of the packages it computes with."""
  return {'python': platform.python_version(), 'dfkd_jax': dfkd_jax.__version__} | {
      name: importlib.metadata.version(name) for name in _PACKAGES}


def device() -> dict[str, str | int]:
  """Describes accelerator and host: platform, kind, count, processes, cpu (model), usable cores."""
  devices, cpu = jax.devices(), platform.processor() or platform.machine()
  with contextlib.suppress(OSError), open('/proc/cpuinfo', errors='replace') as file:
    cpu = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), cpu)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return {'platform': devices[0].platform, 'kind': devices[0].device_kind, 'count': len(devices),
          'processes': jax.process_count(), 'cpu': cpu, 'cores': cores}
