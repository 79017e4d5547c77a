"""Shows the progress of a run."""

import sys
import time
from typing import TextIO

import tqdm

from dfkd_jax import parallel


def say(text: str, stream: TextIO | None = None) -> None:
  """Prints a line to a stream, by default to stdout, on the first process only."""
  if parallel.is_first():
    print(text, file=stream, flush=True)


def note(text: str) -> None:
  """Prints a line to stderr, on the first process only."""
  say(text, sys.stderr)


class Progress:
  """A bar if the stream is a terminal, or plain lines; a context manager.

  Plain lines: about twenty in all, one for the first round, and one after a minute of silence.
  Only the first process shows progress, by default on stderr. Of `total` rounds, `initial` were
  done before this process. `unit` names a round.
  """

  def __init__(
      self, total: int, *, initial: int = 0, unit: str = 'round', stream: TextIO | None = None):
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
      say(f'{self._unit} {self._done + 1}/{self._total} started', self._stream)
    return self

  def __exit__(self, *error) -> None:
    if self._bar is not None:  # The bar stays visible.
      self._bar.close()

  def update(self, **numbers: float) -> None:
    """Counts a round as done. Numbers, such as loss=..., are shown until they are replaced."""
    self._done += 1
    self._numbers |= {name: f'{float(value):.3g}' for name, value in numbers.items()}
    now = time.perf_counter()
    if self._bar is not None:
      self._bar.set_postfix(self._numbers, refresh=False)
      self._bar.update()
    elif (self._done % max(1, self._total // 20) == 0
          or self._done in (self._initial + 1, self._total)
          or now - self._last_line > 60):
      seconds, self._last_line = now - self._start, now
      left = seconds / (self._done - self._initial) * (self._total - self._done)
      numbers = [f'{name} {value}' for name, value in self._numbers.items()]
      say('  '.join([f'{self._unit} {self._done}/{self._total}', *numbers,
                     f'{seconds:.0f} s, {left:.0f} s left']), self._stream)
