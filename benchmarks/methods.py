r"""All methods on the embedded data set at equal wall-clock, and the ablations of SSD-KD: a table each.

python benchmarks/methods.py --seconds=300 --seeds 0 1 2 --workdir=runs/methods
python benchmarks/methods.py --ablations --seconds=300 --seeds 0 1 2 --workdir=runs/ablations

Each run is `python main.py --config=configs/default.py:METHOD` in a process of its own, without the control. How many
rounds fill the time is measured first, by a short run of the same config; so the schedule of the learning rate fits.
Time is synthesis and student steps; evaluation and compilation come on top and are the same for all but a few seconds.
With --at_once=2 two runs go side by side, each on its half of the cores (Linux). Runs that are in the workdir already
are not done again, if their config is the same, so a table may be stopped and gone on with. Accuracy and agreement are
those of the last round; the best is picked on the test images. Settings are compared with --set on other images than
the test's: here those that the TEACHER of configs/teacher_fashion_mnist.py:validate has not seen.

python benchmarks/methods.py --workdir=runs/validation \
    --set teacher.source=TEACHER dataset.data_dir=DATA 'dataset.test_split=train[55000:]'
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # For configs, which are no package.

from dfkd_jax import cli  # noqa: E402

METHODS = ('fast_dfkd', 'ssd_kd', 'cu_dfkd', 'dfq', 'dfad', 'zskt', 'dafl', 'cmi', 'deep_inversion', 'nayer')
AVERAGED = ('fast_dfkd', 'ssd_kd', 'cu_dfkd', 'dfq')  # Also with a moving average of the generator (MAD).
ROWS = {method: (method, ()) for method in METHODS} | {
    f'{method} averaged': (method, ('method.ema_decay=0.95',)) for method in AVERAGED}
ABLATIONS = {
    'SSD-KD': (),
    'without diversity': ('method.diversity=false',),
    'without difficulty': ('method.difficulty=false',),
    'uniform draw': ('method.draw=uniform',),
    'N = 500': ('method.capacity=500',),
    'N = 2,500': ('method.capacity=2500',),
    'N unlimited': ('method.capacity=100000',),  # More than a run of five minutes writes.
    'beta = 0': ('method.beta=0.0',),
    'beta = 0.7': ('method.beta=0.7',),
    'gamma = 0': ('method.gamma=0.0',),
    'gamma = 1': ('method.gamma=1.0',),
    'gamma = 5': ('method.gamma=5.0',),
}
PARTS = ('synthesis', 'student', 'evaluation', 'compile')
PLANNED = ('seed', 'control', 'distill.rounds', 'evaluate.every')  # Not for --set.
SHORT, WARMUP = 10, 2  # Rounds of the run that measures what they cost, and how many are without the student.
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Pool:
  """Runs main.py in so many processes at once, each on its own share of the cores."""

  def __init__(self, at_once: int):
    self._shares = queue.SimpleQueue()
    if at_once == 1:
      self._shares.put([])
    else:
      cores = sorted(os.sched_getaffinity(0))
      if not 1 <= at_once <= len(cores):
        raise SystemExit(f'--at_once={at_once} must be from 1 to {len(cores)}, the number of cores.')
      for part in range(at_once):
        self._shares.put(['taskset', '--cpu-list', ','.join(map(str, cores[part::at_once]))])
    self._executor = concurrent.futures.ThreadPoolExecutor(at_once)
    self.map = self._executor.map

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, *error) -> None:
    self._executor.shutdown(wait=False, cancel_futures=True)  # Else runs that nobody waits for would all be done.

  def summary_of(self, method: str, workdir: pathlib.Path, fields: tuple[str, ...]) -> dict:
    """Runs a config, unless it was run before, and reads its summary."""
    fields, path = ('control=false', *fields), workdir / 'summary.json'
    if path.exists():
      wanted = json.loads(json.dumps(config_of(method, fields).to_dict()))
      if json.loads(path.read_text())['config'] != wanted:
        raise SystemExit(f'{workdir} has a run of another config: name another --workdir.')
    else:
      share = self._shares.get()
      try:
        subprocess.run(
            [*share, sys.executable, str(ROOT / 'main.py'), f'--config=configs/default.py:{method}',
             f'--workdir={workdir}', *(f'--config.{field}' for field in fields)],
            check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
      finally:
        self._shares.put(share)
    return json.loads(path.read_text())


def config_of(method: str, fields: tuple[str, ...]):
  """The config of a method with these fields set."""
  config = cli.load(f'configs/default.py:{method}')
  cli.override(config, [f'--config.{field}' for field in fields])
  return config


def fields_for(seconds: float, method: str, fields: tuple[str, ...], short: dict) -> tuple[str, ...]:
  """The fields by which synthesis and student steps fill the time, from what the rounds of a short run cost."""
  config = config_of(method, fields)
  synthesis, student = short['seconds']['synthesis'] / SHORT, short['seconds']['student'] / (SHORT - WARMUP)
  warmup = config.distill.distill_after
  rounds = max(warmup + 1, round((seconds + warmup * student) / (synthesis + student)))
  found = [*fields, f'distill.rounds={rounds}', f'evaluate.every={max(1, rounds // 10)}']
  share = rounds / config.distill.rounds
  if 'adversarial' in config.method:  # A ramp keeps its place in the run, and its height.
    ramp = config.method.adversarial
    found += [f'method.adversarial.{name}={round(ramp[name] * share)}' for name in ('begin', 'end')]
    found.append(f'method.adversarial.slope={ramp.slope / share:.6g}')
  if 'threshold_growth' in config.method:
    found.append(f'method.threshold_growth={config.method.threshold_growth / share:.6g}')
  return tuple(found)


def line(name: str, found: list[dict]) -> str:
  """A row of the table: mean and spread over the seeds; of seconds the median, lest one run was disturbed."""
  last, best = ([100 * summary['student'][which]['top1'] for summary in found] for which in ('last', 'best'))
  mean_of = lambda value: statistics.mean(map(value, found))
  spread = f' ± {statistics.stdev(last):.2f}' if len(last) > 1 else ''
  median_of = lambda value: statistics.median(map(value, found))
  seconds = ' / '.join(f'{median_of(lambda summary, part=part: summary["seconds"][part]):.0f}' for part in PARTS)
  mean, agreement = statistics.mean(last), 100 * mean_of(lambda summary: summary['student']['last']['agreement'])
  rounds, wall = found[0]['student']['last']['round'], median_of(lambda summary: summary['wall_seconds'])
  return (f'| {name} | {mean:.2f}{spread} | {mean / found[0]["teacher"]["top1"] / 100:.3f} | '
          f'{statistics.mean(best):.2f} | {agreement:.2f} | {rounds} | {seconds} | {wall:.0f} |')


def run() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seconds', type=float, default=300.0, help='of synthesis and student steps, for each run')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--methods', nargs='+', default=tuple(ROWS), choices=tuple(ROWS), metavar='ROW',
                      help='of %(choices)s; default: all')
  parser.add_argument('--ablations', action='store_true', help='of SSD-KD, instead of the methods')
  parser.add_argument('--at_once', type=int, default=1, help='runs side by side, each on its share of the cores')
  parser.add_argument('--set', nargs='+', default=[], metavar='FIELD=VALUE', help='fields of the config, for all runs')
  parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/methods'))
  options = parser.parse_args()
  if refused := [field for field in options.set if field.partition('=')[0] in PLANNED]:
    raise SystemExit(f'--set {" ".join(refused)}: this program sets {", ".join(PLANNED)} itself.')
  common, seeds = tuple(options.set), list(dict.fromkeys(options.seeds))
  rows = {name: ('ssd_kd', fields) for name, fields in ABLATIONS.items()} if options.ablations else {
      name: ROWS[name] for name in options.methods}
  rows = [(name, method, (*common, *fields)) for name, (method, fields) in rows.items()]
  try:
    for _, method, fields in rows:
      config_of(method, fields)
  except ValueError as error:
    raise SystemExit(f'--set: {error}') from error
  folder_of = lambda name: options.workdir.absolute() / name.lower().replace(' ', '_').replace(',', '')

  def planned(row):
    name, method, fields = row
    short = pool.summary_of(
        method, folder_of(name) / 'short', (*fields, f'distill.distill_after={WARMUP}', f'distill.rounds={SHORT}'))
    return fields_for(options.seconds, method, fields, short)

  def done(task):
    (name, method, _), fields, seed = task
    return pool.summary_of(method, folder_of(name) / f'seed{seed}', (*fields, f'seed={seed}'))

  with Pool(options.at_once) as pool:
    plans = list(pool.map(planned, rows))
    found = pool.map(done, [(row, plan, seed) for row, plan in zip(rows, plans, strict=True) for seed in seeds])
    print(f'| method | last round, % | of the teacher | best round, % | agreement, % | rounds | {" / ".join(PARTS)}, s '
          '| wall, s |\n|---|---|---|---|---|---|---|---|')
    for name, _, _ in rows:
      print(line(name, [next(found) for _ in seeds]), flush=True)


if __name__ == '__main__':
  run()
