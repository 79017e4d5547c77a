"""All methods on the embedded data set at equal wall-clock, and the ablations of SSD-KD: a table each.

python benchmarks/methods.py --seconds=300 --seeds 0 1 2 --workdir=runs/methods
python benchmarks/methods.py --ablations --seconds=300 --seeds 0 --workdir=runs/ablations

Each run is `python main.py --config=configs/default.py:METHOD` in a process of its own, without the control. How many
rounds fill the time is measured first, by a short run of the same config; so the schedule of the learning rate fits.
Time is synthesis and student steps; evaluation and compilation come on top and are the same for all but a few seconds.
With --at_once=2 two runs go side by side, each on its half of the cores (Linux). Runs that are there already are not
done again, so a table may be stopped and gone on with. Accuracy is that of the last round. Settings are compared on
images other than the test's with --set, here those that configs/teacher_fashion_mnist.py leaves out:

python benchmarks/methods.py --set teacher.source=TEACHER dataset.data_dir=DATA 'dataset.test_split=train[55000:]'
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys

METHODS = ('fast_dfkd', 'ssd_kd', 'cu_dfkd', 'dfq', 'dfad', 'zskt', 'dafl', 'cmi', 'deep_inversion')
ABLATIONS = {
    'SSD-KD': (),
    'without diversity': ('method.diversity=false',),
    'without difficulty': ('method.difficulty=false',),
    'uniform draw': ('method.draw=uniform',),
    'N = 512': ('method.capacity=512',),
    'N = 2,500': ('method.capacity=2500',),
    'N unlimited': ('method.capacity=60000',),
    'beta = 0': ('method.beta=0.0',),
    'beta = 0.7': ('method.beta=0.7',),
    'gamma = 0': ('method.gamma=0.0',),
    'gamma = 1': ('method.gamma=1.0',),
    'gamma = 5': ('method.gamma=5.0',),
}
PARTS = ('synthesis', 'student', 'evaluation', 'compile')
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402


class Pool:
  """Runs main.py in so many processes at once, each on its own share of the cores."""

  def __init__(self, at_once: int, fields: tuple[str, ...]):
    cores = os.cpu_count()
    if not 1 <= at_once <= cores:
      raise SystemExit(f'--at_once={at_once} must be from 1 to {cores}, the number of cores.')
    self._fields = fields
    self._shares = queue.SimpleQueue()
    for part in range(at_once):
      share = ','.join(map(str, range(part, cores, at_once)))
      self._shares.put(['taskset', '--cpu-list', share] if at_once > 1 else [])
    self.map = concurrent.futures.ThreadPoolExecutor(at_once).map

  def summary_of(self, method: str, workdir: pathlib.Path, fields: tuple[str, ...]) -> dict:
    """Runs a config, unless it was run before, and reads its summary."""
    if not (workdir / 'summary.json').exists():
      share = self._shares.get()
      try:
        subprocess.run(
            [*share, sys.executable, str(ROOT / 'main.py'), f'--config=configs/default.py:{method}',
             f'--workdir={workdir}', '--config.control=false',
             *(f'--config.{field}' for field in (*self._fields, *fields))],
            check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
      finally:
        self._shares.put(share)
    return json.loads((workdir / 'summary.json').read_text())


def fields_for(seconds: float, method: str, fields: tuple[str, ...], short: dict) -> tuple[str, ...]:
  """The fields by which synthesis and student steps fill the time, from what the rounds of a short run cost."""
  config = main.load(f'configs/default.py:{method}')
  synthesis, student = short['seconds']['synthesis'] / _SHORT, short['seconds']['student'] / (_SHORT - 2)
  warmup = config.distill.distill_after
  rounds = max(warmup + 1, round((seconds + warmup * student) / (synthesis + student)))
  found = [*fields, f'distill.rounds={rounds}', f'evaluate.every={max(1, rounds // 10)}']
  if 'adversarial' in config.method:  # A ramp keeps its place in the run.
    ramp, share = config.method.adversarial, rounds / config.distill.rounds
    found += [f'method.adversarial.{name}={round(ramp[name] * share)}' for name in ('begin', 'end')]
  return tuple(found)


_SHORT = 10  # Rounds, two of them without the student.


def line(name: str, found: list[dict]) -> str:
  """A row of the table: mean and spread over the seeds."""
  last = [100 * summary['student']['last']['top1'] for summary in found]
  mean_of = lambda value: statistics.mean(map(value, found))
  spread = f' ± {statistics.stdev(last):.2f}' if len(last) > 1 else ''
  seconds = ' / '.join(f'{mean_of(lambda summary, part=part: summary["seconds"][part]):.0f}' for part in PARTS)
  mean, agreement = statistics.mean(last), 100 * mean_of(lambda summary: summary['student']['last']['agreement'])
  rounds, wall = found[0]['student']['last']['round'], mean_of(lambda summary: summary['wall_seconds'])
  return (f'| {name} | {mean:.2f}{spread} | {mean / found[0]["teacher"]["top1"] / 100:.3f} | {agreement:.2f} | '
          f'{rounds} | {seconds} | {wall:.0f} |')


def run() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seconds', type=float, default=300.0, help='of synthesis and student steps, for each run')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--methods', nargs='+', default=METHODS, choices=METHODS)
  parser.add_argument('--ablations', action='store_true', help='of SSD-KD, instead of the methods')
  parser.add_argument('--at_once', type=int, default=1, help='runs side by side, each on its share of the cores')
  parser.add_argument('--set', nargs='+', default=[], metavar='FIELD=VALUE', help='fields of the config, for all runs')
  parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/methods'))
  options = parser.parse_args()
  rows = [(name, 'ssd_kd', fields) for name, fields in ABLATIONS.items()] if options.ablations else [
      (method, method, ()) for method in options.methods]
  pool = Pool(options.at_once, tuple(options.set))
  folder_of = lambda name: options.workdir.absolute() / name.lower().replace(' ', '_').replace(',', '')

  def planned(row):
    name, method, fields = row
    short = pool.summary_of(
        method, folder_of(name) / 'short', (*fields, 'distill.distill_after=2', f'distill.rounds={_SHORT}'))
    return fields_for(options.seconds, method, fields, short)

  def done(task):
    (name, method, _), fields, seed = task
    return pool.summary_of(method, folder_of(name) / f'seed{seed}', (*fields, f'seed={seed}'))

  plans = list(pool.map(planned, rows))
  found = pool.map(done, [(row, plan, seed) for row, plan in zip(rows, plans, strict=True) for seed in options.seeds])
  print('| method | student, % | student / teacher | agreement, % | rounds | '
        f'{" / ".join(PARTS)}, s | wall, s |')
  print('|---|---|---|---|---|---|---|')
  for name, _, _ in rows:
    print(line(name, [next(found) for _ in options.seeds]), flush=True)


if __name__ == '__main__':
  run()
