r"""Kills runs repeatedly, resumes them, and compares the results with an undisturbed run.

  # The embedded quick start:
  python benchmarks/kill.py --kills=50 --workdir=runs/kill
  python benchmarks/kill.py --kills=5 --a_run=1 --workdir=runs/kill \
      --config=configs/default.py:smoke

Further arguments are passed to main.py. The first run is undisturbed. The other runs are killed
with SIGKILL, `--a_run` times each, at instants drawn from fixed seeds. Of five kills, one comes
while a program is compiled, one while a checkpoint is written, and three at any time, also while
Python starts. A process that ends before its instant does not count as a kill.

These must be equal, bit for bit: every array of the last checkpoint (student, best student,
generator, optimizers, buffer), metrics.jsonl without its times, the weights, the picture and the
results. Prints a line for each kill and run, and writes kills.json. The exit status is 1 if
anything differs.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfkd_jax import weights

ROOT = pathlib.Path(__file__).resolve().parent.parent
KINDS = ('any', 'compile', 'write', 'any', 'any')  # In turn; the first three are all there are.
FILES = ('student.safetensors', 'student_best.safetensors', 'images.png')
# Kills are up to this many times a run's share for a kill apart, because starting and repeating
# lost work takes most of the time.
SPREAD = 6.0
POLL = 0.002  # Seconds between two looks at the state of a run.


def start(arguments: Sequence[str], workdir: pathlib.Path) -> subprocess.Popen:
  """Starts a run that logs its compilations."""
  with (workdir.parent / f'{workdir.name}.log').open('a') as log:
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'main.py'), *arguments, f'--workdir={workdir}'], stdout=log,
        stderr=log, env=os.environ | {'JAX_LOG_COMPILES': '1'}, start_new_session=True)


def kill(
    run: subprocess.Popen, kind: str, draw: random.Random, seconds: float, workdir: pathlib.Path
) -> float | None:
  """Kills a run at an instant of a kind. Returns its seconds, or None if it ended before."""
  began = time.monotonic()
  if kind == 'any':
    wait_until(run, lambda: False, draw.uniform(0, seconds))
  else:
    happens = {'compile': Compiling(workdir, draw.randrange(40)),
               'write': lambda: is_writing(workdir)}[kind]
    wait_until(run, happens, 10 * seconds)
    time.sleep(draw.uniform(0, {'compile': 0.02, 'write': 0.2}[kind]))
  if run.poll() is not None:
    return None
  os.killpg(run.pid, signal.SIGKILL)
  run.wait()
  return time.monotonic() - began


def wait_until(run: subprocess.Popen, happens, seconds: float) -> None:
  """Waits until something happens, the run ends, or the time is over."""
  last = time.monotonic() + seconds
  while run.poll() is None and time.monotonic() < last and not happens():
    time.sleep(POLL)


class Compiling:
  """A predicate: whether more than `number` compilations were logged since it was made."""

  def __init__(self, workdir: pathlib.Path, number: int):
    self._log, self._number = workdir.parent / f'{workdir.name}.log', number
    self._offset = self._log.stat().st_size

  def __call__(self) -> bool:
    """Reads the log."""
    with self._log.open('rb') as log:
      log.seek(self._offset)
      return log.read().count(b'Compiling ') > self._number


def is_writing(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint is being written."""
  for folder in ('checkpoints', 'control'):
    with contextlib.suppress(OSError):
      if any('tmp' in name for name in os.listdir(workdir / folder)):
        return True
  return False


def results(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns all results of a run: arrays, bytes and JSON values, by name."""
  arrays = weights.read_subtree(weights.find_checkpoint(workdir / 'checkpoints'), '')
  files = {name: np.frombuffer((workdir / name).read_bytes(), np.uint8) for name in FILES}
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  metrics = [{name: value for name, value in line.items() if not name.startswith('seconds_')}
             for line in lines]
  summary = json.loads((workdir / 'summary.json').read_text())
  names = ('student', 'teacher', 'control', 'images', 'preflight')
  figures = {name: summary.get(name) for name in names}
  return arrays | files | {'metrics.jsonl': metrics, 'results': figures}


def differing(actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
  """Returns the names of results that are not equal, bit for bit."""
  return sorted(name for name in actual.keys() | expected.keys()
                if name not in actual or name not in expected
                or not _is_same(actual[name], expected[name]))


def _is_same(one: Any, other: Any) -> bool:
  if not isinstance(one, np.ndarray):
    return one == other
  return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def run_through(arguments: Sequence[str], workdir: pathlib.Path) -> float:
  """Waits for the end of a run; returns its seconds."""
  began = time.monotonic()
  if start(arguments, workdir).wait():
    raise SystemExit(f'The run failed; see {workdir.parent / workdir.name}.log.')
  return time.monotonic() - began


def main(argv: Sequence[str]) -> int:
  """Runs the benchmark; returns the exit status."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument(
      '--a_run', type=int, default=17, help='kills of one run before it may finish')
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='a new folder')
  options, arguments = parser.parse_known_args(argv)
  options.workdir.mkdir(parents=True)
  seconds = run_through(arguments, options.workdir / 'undisturbed')
  undisturbed, kills, runs, missed = results(options.workdir / 'undisturbed'), [], [], 0
  print(f'undisturbed: {seconds:.0f} s, {len(undisturbed)} results', flush=True)
  while len(kills) < options.kills:
    workdir, ended = options.workdir / f'run{len(runs)}', False
    before = len(kills)
    while not ended and len(kills) < options.kills and len(kills) - before < options.a_run:
      seed = len(kills)
      began, run = time.monotonic(), start(arguments, workdir)
      draw = random.Random(f'{seed} {missed}')
      kind = KINDS[seed % len(KINDS)]
      after = kill(run, kind, draw, min(1, SPREAD / options.a_run) * seconds, workdir)
      ended = after is None
      if ended:
        missed += 1
        seconds = min(seconds, time.monotonic() - began) if len(kills) == before else seconds
      else:
        kills.append({'run': len(runs), 'seed': seed, 'kind': kind, 'seconds': after,
                      'rounds': rounds(workdir), 'saved': saved(workdir),
                      'control': saved(workdir, 'control')})
        print(f'kill {seed + 1}: {kills[-1]}', flush=True)
    run_through(arguments, workdir)
    runs.append({'kills': len(kills) - before,
                 'differing': differing(results(workdir), undisturbed)})
    print(f'run {len(runs)}: {runs[-1]}', flush=True)
    shutil.rmtree(workdir)
    (options.workdir / 'kills.json').write_text(json.dumps(
        {'seconds': seconds, 'results': len(undisturbed), 'kills': kills, 'runs': runs}, indent=2))
  wrong = sum(bool(run['differing']) for run in runs)
  print(f'{len(kills)} kills in {len(runs)} runs; {wrong} differ from the undisturbed run.')
  return int(wrong > 0)


def rounds(workdir: pathlib.Path) -> int:
  """Returns the number of rounds in metrics.jsonl."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def saved(workdir: pathlib.Path, folder: str = 'checkpoints') -> int:
  """Returns the rounds, or steps, in the latest complete checkpoint."""
  names = [path.name for path in (workdir / folder).glob('*')]
  return max((int(name) for name in names if re.fullmatch(r'\d+', name)), default=0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
