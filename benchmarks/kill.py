r"""Kills a run again and again, lets it go on each time, and compares it with one that nobody disturbed.

  python benchmarks/kill.py --kills=50 --workdir=runs/kill                        # the embedded quick start
  python benchmarks/kill.py --kills=5 --a_run=1 --workdir=runs/kill --config=configs/default.py:smoke

Further arguments are those of main.py. First an undisturbed run; then runs that are killed with SIGKILL, `--a_run`
times each, at instants drawn from fixed seeds: of five kills one comes while a program is compiled, one while a
checkpoint is written, and three at any time, the start of Python included, so far apart that all the kills of a run
together reach far into it; a start that comes to its end before its instant is no kill. Every array of the last
checkpoint (student, best student, generator, optimizers, buffer), metrics.jsonl without its clock, the weights, the
picture and the results must be the same, bit for bit. Prints a line for each kill and run, writes kills.json; the exit
status is 1 if anything differs.
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
KINDS = ('any', 'compile', 'any', 'write', 'any')
FILES = ('student.safetensors', 'student_best.safetensors', 'images.png')
SPREAD = 6.0  # Instants are drawn from this many times a run's share for a kill: most is start and work lost.
POLL = 0.002  # Seconds between looks at what a run is doing.


def start(arguments: Sequence[str], workdir: pathlib.Path) -> subprocess.Popen:
  """A run, with its compilations in its log."""
  with (workdir.parent / f'{workdir.name}.log').open('a') as log:
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'main.py'), *arguments, f'--workdir={workdir}'], stdout=log, stderr=log,
        env=os.environ | {'JAX_LOG_COMPILES': '1'}, start_new_session=True)


def kill(run: subprocess.Popen, kind: str, draw: random.Random, seconds: float, workdir: pathlib.Path) -> float | None:
  """Kills a run at an instant of a kind; seconds since its start, or None if it ended before."""
  began = time.monotonic()
  if kind == 'any':
    wait_until(run, lambda: False, draw.uniform(0, seconds))
  else:
    happens = {'compile': Compiling(workdir, draw.randrange(40)), 'write': lambda: writing(workdir)}[kind]
    wait_until(run, happens, 10 * seconds)
    time.sleep(draw.uniform(0, {'compile': 0.02, 'write': 0.2}[kind]))
  if run.poll() is not None:
    return None
  os.killpg(run.pid, signal.SIGKILL)
  run.wait()
  return time.monotonic() - began


def wait_until(run: subprocess.Popen, happens, seconds: float) -> None:
  """Returns when something happens, or after so many seconds, or when the run ends."""
  last = time.monotonic() + seconds
  while run.poll() is None and time.monotonic() < last and not happens():
    time.sleep(POLL)


class Compiling:
  """Whether the log tells of so many more compilations than when this was made."""

  def __init__(self, workdir: pathlib.Path, number: int):
    self._log, self._number = workdir.parent / f'{workdir.name}.log', number
    self._offset = self._log.stat().st_size

  def __call__(self) -> bool:
    """Looks."""
    with self._log.open('rb') as log:
      log.seek(self._offset)
      return log.read().count(b'Compiling ') > self._number


def writing(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint is being written."""
  for folder in ('checkpoints', 'control'):
    with contextlib.suppress(OSError):
      if any('tmp' in name for name in os.listdir(workdir / folder)):
        return True
  return False


def results(workdir: pathlib.Path) -> dict[str, Any]:
  """All that a run came to: arrays and bytes, by name."""
  arrays = weights.read_subtree(weights.find_checkpoint(workdir / 'checkpoints'), '')
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  summary = json.loads((workdir / 'summary.json').read_text())
  return arrays | {name: np.frombuffer((workdir / name).read_bytes(), np.uint8) for name in FILES} | {
      'metrics.jsonl': [{k: v for k, v in line.items() if not k.startswith('seconds_')} for line in lines],
      'results': {name: summary.get(name) for name in ('student', 'teacher', 'control', 'images', 'preflight')}}


def differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
  """Names of what is not the same, bit for bit."""
  return sorted(name for name in found.keys() | wanted.keys() if name not in found or name not in wanted
                or not _same(found[name], wanted[name]))


def _same(one: Any, other: Any) -> bool:
  if not isinstance(one, np.ndarray):
    return one == other
  return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def run_through(arguments: Sequence[str], workdir: pathlib.Path) -> float:
  """Lets a run come to its end; its seconds."""
  began = time.monotonic()
  if start(arguments, workdir).wait():
    raise SystemExit(f'The run failed; see {workdir.parent / workdir.name}.log.')
  return time.monotonic() - began


def main(argv: Sequence[str]) -> int:
  """The whole of it; returns the exit status."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--a_run', type=int, default=17, help='kills of one run before it may come to its end')
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='a new folder')
  wanted, arguments = parser.parse_known_args(argv)
  wanted.workdir.mkdir(parents=True)
  seconds = run_through(arguments, wanted.workdir / 'undisturbed')
  undisturbed, kills, runs, missed = results(wanted.workdir / 'undisturbed'), [], [], 0
  print(f'undisturbed: {seconds:.0f} s, {len(undisturbed)} results', flush=True)
  while len(kills) < wanted.kills:
    workdir, ended = wanted.workdir / f'run{len(runs)}', False
    before = len(kills)
    while not ended and len(kills) < wanted.kills and len(kills) - before < wanted.a_run:
      seed = len(kills)
      began, run = time.monotonic(), start(arguments, workdir)
      draw = random.Random(f'{seed} {missed}')
      after = kill(run, KINDS[seed % len(KINDS)], draw, min(1, SPREAD / wanted.a_run) * seconds, workdir)
      ended = after is None
      if ended:
        missed += 1
        seconds = min(seconds, time.monotonic() - began) if len(kills) == before else seconds
      else:
        kills.append({'run': len(runs), 'seed': seed, 'kind': KINDS[seed % len(KINDS)], 'seconds': after,
                      'rounds': rounds(workdir), 'saved': saved(workdir), 'control': saved(workdir, 'control')})
        print(f'kill {seed + 1}: {kills[-1]}', flush=True)
    run_through(arguments, workdir)
    runs.append({'kills': len(kills) - before, 'differing': differing(results(workdir), undisturbed)})
    print(f'run {len(runs)}: {runs[-1]}', flush=True)
    shutil.rmtree(workdir)
    (wanted.workdir / 'kills.json').write_text(json.dumps(
        {'seconds': seconds, 'results': len(undisturbed), 'kills': kills, 'runs': runs}, indent=2))
  wrong = sum(bool(run['differing']) for run in runs)
  print(f'{len(kills)} kills in {len(runs)} runs, of which {wrong} differ from the undisturbed one.')
  return int(wrong > 0)


def rounds(workdir: pathlib.Path) -> int:
  """Rounds in metrics.jsonl."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def saved(workdir: pathlib.Path, folder: str = 'checkpoints') -> int:
  """Rounds, or steps, in the latest complete checkpoint."""
  folder = workdir / folder
  found = [int(path.name) for path in folder.iterdir() if re.fullmatch(r'\d+', path.name)] if folder.exists() else []
  return max(found, default=0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
