r"""Compares methods, ablations of SSD-KD, or initialisations of the student's head, at equal time.

python benchmarks/methods.py --seconds=300 --seeds 0 1 2 --workdir=runs/methods
python benchmarks/methods.py --ablations --seconds=300 --seeds 0 1 2 --workdir=runs/ablations
python benchmarks/methods.py --heads --seconds=300 --seeds 0 1 2 --workdir=runs/heads

The data set is the embedded one by default. Each run is
`python main.py --config=configs/default.py:METHOD`, or of the file of --config. A short run of the
same config measures first how many rounds fill the time, so the learning rate schedule fits.
Segmentation of street scenes:

python benchmarks/methods.py --config=camvid --methods fast_dfkd ssd_kd dfad cu_dfkd \
    --seconds=1800 --at_once=2 --workdir=runs/camvid \
    --set teacher.source=espnet_p2_q8_camvid.pth dataset.data_dir=DATA

The time counts synthesis, student steps and the fit of a head, not evaluation and compilation,
which differ by a few seconds. With --at_once=2, two runs share the cores (Linux).

Runs that are in the workdir already are not repeated, so a table can be stopped and resumed.
Metrics are from the last round. The best round is selected on the test images. Use
--set to compare settings on other images. This uses images that the TEACHER of
configs/teacher_fashion_mnist.py:validate was not trained on:

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

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dfkd_jax import cli, synth  # noqa: E402
from dfkd_jax.spline import head_init  # noqa: E402

# Also compared with a moving average of the generator (MAD).
AVERAGED = ('fast_dfkd', 'ssd_kd', 'cu_dfkd', 'dfq')
ROWS = {method: (method, ()) for method in synth.names() if method != 'noise'} | {
    f'{method} averaged': (method, ('method.ema_decay=0.95',)) for method in AVERAGED}
ABLATIONS = {
    'SSD-KD': (),
    'without diversity': ('method.diversity=false',),
    'without difficulty': ('method.difficulty=false',),
    'uniform draw': ('method.draw=uniform',),
    'N = 500': ('method.capacity=500',),
    'N = 2,500': ('method.capacity=2500',),
    'N unlimited': ('method.capacity=100000',),  # More than five minutes write.
    'beta = 0': ('method.beta=0.0',),
    'beta = 0.7': ('method.beta=0.7',),
    'gamma = 0': ('method.gamma=0.0',),
    'gamma = 1': ('method.gamma=1.0',),
    'gamma = 5': ('method.gamma=5.0',),
}
HEADS = {f'{kind} head': ('student.head_width=64', f'student.head_init={kind}')
         for kind in ('random', *head_init.KINDS)}
PARTS = ('synthesis', 'student', 'evaluation', 'compile')
PLANNED = ('seed', 'distill.rounds', 'evaluate.every')  # Not allowed in --set.
SHORT, WARMUP = 10, 2  # Rounds of the short run, and how many of them have no student steps.


class Pool:
  """Runs main.py in several processes at once, each on its own share of the cores."""

  def __init__(self, at_once: int):
    self._shares = queue.SimpleQueue()
    if at_once == 1:
      self._shares.put([])
    else:
      cores = sorted(os.sched_getaffinity(0))
      if not 1 <= at_once <= len(cores):
        raise SystemExit(
            f'--at_once={at_once} must be from 1 to {len(cores)}, the number of cores.')
      for part in range(at_once):
        self._shares.put(['taskset', '--cpu-list', ','.join(map(str, cores[part::at_once]))])
    self._executor = concurrent.futures.ThreadPoolExecutor(at_once)
    self.map = self._executor.map

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, *error) -> None:
    self._executor.shutdown(wait=False, cancel_futures=True)  # Drops queued runs after an error.

  def summary_of(self, config: str, workdir: pathlib.Path, fields: tuple[str, ...]) -> dict:
    """Runs a config unless its summary exists; returns the summary."""
    path = workdir / 'summary.json'
    if path.exists():
      expected = json.loads(json.dumps(config_of(config, fields).to_dict()))
      if json.loads(path.read_text())['config'] != expected:
        raise SystemExit(f'{workdir} has a run of another config: name another --workdir.')
    else:
      share = self._shares.get()
      try:
        subprocess.run(
            [*share, sys.executable, str(ROOT / 'main.py'), f'--config={config}',
             f'--workdir={workdir}', *(f'--config.{field}' for field in fields)],
            check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
      finally:
        self._shares.put(share)
    return json.loads(path.read_text())


def config_of(config: str, fields: tuple[str, ...]):
  """Returns a config, such as 'configs/default.py:dfq', with fields set."""
  loaded = cli.load(config)
  cli.override(loaded, [f'--config.{field}' for field in fields])
  return loaded


def fields_for(
    seconds: float, config: str, fields: tuple[str, ...], short: dict
) -> tuple[str, ...]:
  """Returns fields with which a run fills the time, from the summary of a short run."""
  config = config_of(config, fields)
  synthesis = short['seconds']['synthesis'] / SHORT
  student = short['seconds']['student'] / (SHORT - WARMUP)
  warmup = config.distill.distill_after
  seconds -= (short.get('head') or {'seconds': 0.0})['seconds']
  rounds = max(warmup + 1, round((seconds + warmup * student) / (synthesis + student)))
  planned = [*fields, f'distill.rounds={rounds}', f'evaluate.every={max(1, rounds // 10)}']
  share = rounds / config.distill.rounds
  if 'adversarial' in config.method:  # A ramp keeps its place in the run, and its height.
    ramp = config.method.adversarial
    planned += [
        f'method.adversarial.{name}={round(ramp[name] * share)}' for name in ('begin', 'end')]
    planned.append(f'method.adversarial.slope={ramp.slope / share:.6g}')
  if 'threshold_growth' in config.method:
    planned.append(f'method.threshold_growth={config.method.threshold_growth / share:.6g}')
  return tuple(planned)


def table_row(name: str, summaries: list[dict]) -> str:
  """Formats means over the seeds. Seconds are medians, because other programs may disturb a run."""
  students = [summary['student'] for summary in summaries]
  headline = summaries[0]['columns'][0][0]
  last, best = ([100 * student[kind][headline] for student in students]
                for kind in ('last', 'best'))
  mean, spread = statistics.mean(last), f' ± {statistics.stdev(last):.2f}' if len(last) > 1 else ''
  agreement = 100 * statistics.mean(student['last']['agreement'] for student in students)
  medians = [statistics.median(summary['seconds'][part] for summary in summaries) for part in PARTS]
  seconds = ' / '.join(f'{median:.0f}' for median in medians)
  wall = statistics.median(summary['wall_seconds'] for summary in summaries)
  return (f'| {name} | {mean:.2f}{spread} | {mean / summaries[0]["teacher"][headline] / 100:.3f} | '
          f'{statistics.mean(best):.2f} | {agreement:.2f} | {students[0]["last"]["round"]} | '
          f'{seconds} | {wall:.0f} |')


def run() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='default', help='file in configs/ (default: %(default)s)')
  parser.add_argument('--seconds', type=float, default=300.0,
                      help='of synthesis and student steps, for each run')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--methods', nargs='+', default=tuple(ROWS), choices=tuple(ROWS),
                      metavar='ROW', help='rows of the table: %(choices)s; default: all')
  instead = parser.add_mutually_exclusive_group()
  instead.add_argument('--ablations', action='store_true',
                       help='ablations of SSD-KD instead of the methods')
  instead.add_argument('--heads', action='store_true',
                       help="initialisations of the student's head, of FastDFKD, instead")
  parser.add_argument('--at_once', type=int, default=1,
                      help='number of runs at once, each on its share of the cores')
  parser.add_argument('--set', nargs='+', default=[], metavar='FIELD=VALUE',
                      help='fields of the config, for all runs')
  parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/methods'))
  options = parser.parse_args()
  if planned := [field for field in options.set if field.partition('=')[0] in PLANNED]:
    raise SystemExit(f'--set {" ".join(planned)}: this program sets {", ".join(PLANNED)} itself.')
  common, seeds = tuple(options.set), list(dict.fromkeys(options.seeds))
  rows = {name: ROWS[name] for name in options.methods}
  if options.ablations:
    rows = {name: ('ssd_kd', fields) for name, fields in ABLATIONS.items()}
  if options.heads:
    rows = {name: ('fast_dfkd', fields) for name, fields in HEADS.items()}
  rows = [(name, f'configs/{options.config}.py:{method}', (*common, *fields))
          for name, (method, fields) in rows.items()]
  try:
    for _, config, fields in rows:
      config_of(config, fields)
  except ValueError as error:
    raise SystemExit(f'--config or --set: {error}') from error

  def folder_of(name):
    return options.workdir.absolute() / name.lower().replace(' ', '_').replace(',', '')

  def plan_row(row):
    name, config, fields = row
    short_run = *fields, f'distill.distill_after={WARMUP}', f'distill.rounds={SHORT}'
    short = pool.summary_of(config, folder_of(name) / 'short', short_run)
    return fields_for(options.seconds, config, fields, short)

  def run_seed(task):
    (name, config, _), fields, seed = task
    return pool.summary_of(config, folder_of(name) / f'seed{seed}', (*fields, f'seed={seed}'))

  with Pool(options.at_once) as pool:
    plans = list(pool.map(plan_row, rows))
    tasks = [(row, plan, seed) for row, plan in zip(rows, plans, strict=True) for seed in seeds]
    summaries = pool.map(run_seed, tasks)
    print('| method | last round, % | of the teacher | best round, % | agreement, % | rounds '
          f'| {" / ".join(PARTS)}, s | wall, s |\n|---|---|---|---|---|---|---|---|')
    for name, _, _ in rows:
      print(table_row(name, [next(summaries) for _ in seeds]), flush=True)


if __name__ == '__main__':
  run()
