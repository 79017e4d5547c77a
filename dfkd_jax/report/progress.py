"""How far a run is."""

import sys
import time
from typing import TextIO

import tqdm

from dfkd_jax import parallel

_LONGEST = 60.0  # Seconds without a line, after which each round has one.


def say(text: str) -> None:
  """Prints, on the first of several processes alone."""
  if parallel.is_first():
    print(text)


def note(text: str) -> None:
  """The same, on stderr: what is no result."""
  if parallel.is_first():
    print(text, file=sys.stderr)


class Progress:
  """A live bar where stderr is a terminal, else plain lines; a context manager. It shows on the first process alone.

  There are about twenty lines, besides one for the first round and for each that ends a minute after the last line.

  Args:
    total: Rounds of the whole run.
    initial: Rounds that were done before this process.
    unit: What is counted.
    stream: None is stderr.
  """

  def __init__(self, total: int, *, initial: int = 0, unit: str = 'round', stream: TextIO | None = None):
    self._stream = sys.stderr if stream is None else stream
    self._total, self._initial, self._done, self._unit = total, initial, initial, unit
    self._shown: dict[str, str] = {}
    self._begin = self._said = time.perf_counter()
    self._bar = None
    if self._stream.isatty() and parallel.is_first():
      self._bar = tqdm.tqdm(
        total=total, initial=initial, unit=f' {unit}s', file=self._stream, dynamic_ncols=True, smoothing=0.1
      )

  def __enter__(self) -> 'Progress':
    if self._bar is None and self._done < self._total:  # On slow devices the first round takes minutes.
      self.say(f'{self._unit} {self._done + 1}/{self._total} is under way')
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def update(self, **numbers: float) -> None:
    """One round is done; a number such as loss=... stays in sight until it is given anew."""
    self._done += 1
    self._shown |= {name: f'{float(value):.3g}' for name, value in numbers.items()}
    if self._bar is not None:
      self._bar.set_postfix(self._shown, refresh=False)
      self._bar.update()
    elif (self._done % max(1, self._total // 20) == 0 or self._done in (self._initial + 1, self._total)
          or time.perf_counter() - self._said > _LONGEST):
      self.say(self._line())
      self._said = time.perf_counter()

  def say(self, text: str) -> None:
    """A line of its own, which does not tear the bar."""
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    elif parallel.is_first():
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Leaves the bar as it is; harmless a second time."""
    if self._bar is not None:
      self._bar.close()

  def _line(self) -> str:
    seconds = time.perf_counter() - self._begin
    left = seconds / (self._done - self._initial) * (self._total - self._done)
    shown = [f'{name} {value}' for name, value in self._shown.items()]
    return '  '.join([f'{self._unit} {self._done}/{self._total}', *shown, f'{seconds:.0f} s, {left:.0f} s left'])
