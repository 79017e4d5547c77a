"""Shows the progress of a run."""

import sys
import time
from typing import TextIO

import tqdm

from dfkd_jax import parallel

_LONGEST_SILENCE = 60.0  # Seconds.


def say(text: str) -> None:
  """Prints a line, on the first process only."""
  if parallel.is_first():
    print(text)


def note(text: str) -> None:
  """Prints a line to stderr, on the first process only."""
  if parallel.is_first():
    print(text, file=sys.stderr)


class Progress:
  """A bar if the stream is a terminal, or plain lines; a context manager.

  Plain lines: about twenty in all, one for the first round, and one after a minute of silence.
  Only the first process shows progress.

  Args:
    total: Rounds of the whole run.
    initial: Rounds done before this process.
    unit: Name of a round.
    stream: None: stderr.
  """

  def __init__(
      self, total: int, *, initial: int = 0, unit: str = 'round', stream: TextIO | None = None
  ):
    self._stream = sys.stderr if stream is None else stream
    self._total, self._initial, self._done, self._unit = total, initial, initial, unit
    self._numbers: dict[str, str] = {}
    self._start = self._last_line = time.perf_counter()
    self._bar = None
    if self._stream.isatty() and parallel.is_first():
      self._bar = tqdm.tqdm(total=total, initial=initial, unit=f' {unit}s', file=self._stream,
                            dynamic_ncols=True, smoothing=0.1)

  def __enter__(self) -> 'Progress':
    if self._bar is None and self._done < self._total:  # The first round may take minutes.
      self.say(f'{self._unit} {self._done + 1}/{self._total} started')
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def update(self, **numbers: float) -> None:
    """Counts a round as done. Numbers, such as loss=..., are shown until they are replaced."""
    self._done += 1
    self._numbers |= {name: f'{float(value):.3g}' for name, value in numbers.items()}
    if self._bar is not None:
      self._bar.set_postfix(self._numbers, refresh=False)
      self._bar.update()
    elif (self._done % max(1, self._total // 20) == 0
          or self._done in (self._initial + 1, self._total)
          or time.perf_counter() - self._last_line > _LONGEST_SILENCE):
      self.say(self._line())
      self._last_line = time.perf_counter()

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    elif parallel.is_first():
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Closes the bar, which stays visible; may be called twice."""
    if self._bar is not None:
      self._bar.close()

  def _line(self) -> str:
    seconds = time.perf_counter() - self._start
    left = seconds / (self._done - self._initial) * (self._total - self._done)
    numbers = [f'{name} {value}' for name, value in self._numbers.items()]
    return '  '.join([f'{self._unit} {self._done}/{self._total}', *numbers,
                      f'{seconds:.0f} s, {left:.0f} s left'])
