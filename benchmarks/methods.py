"""All methods on the embedded data set at equal wall-clock, and the ablations of SSD-KD: a table each.

python benchmarks/methods.py --seconds=300 --seeds 0 1 2 --workdir=runs/methods
python benchmarks/methods.py --ablations --seconds=300 --seeds 0 --workdir=runs/ablations

Each run is `python main.py --config=configs/default.py:METHOD` in a process of its own, without the control. How many
rounds fill the time is measured first, by a short run of the same config; so the schedule of the learning rate fits.
Time is synthesis and student steps; evaluation and compilation come on top and are the same for all but a few seconds.
Runs that are there already are not done again. Accuracy is that of the last round.
"""

import argparse
import json
import pathlib
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
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402


def summary_of(method: str, workdir: pathlib.Path, fields: tuple[str, ...]) -> dict:
  """Runs a config, unless it was run before, and reads its summary."""
  if not (workdir / 'summary.json').exists():
    subprocess.run(
        [sys.executable, str(ROOT / 'main.py'), f'--config=configs/default.py:{method}', f'--workdir={workdir}',
         '--config.control=false', *(f'--config.{field}' for field in fields)],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
  return json.loads((workdir / 'summary.json').read_text())


def fields_for(seconds: float, method: str, workdir: pathlib.Path, fields: tuple[str, ...]) -> tuple[str, ...]:
  """The fields by which synthesis and student steps fill the time, from what rounds cost in a short run."""
  config = main.load(f'configs/default.py:{method}')
  short = summary_of(method, workdir, (*fields, 'distill.distill_after=2', 'distill.rounds=10'))
  synthesis, student = short['seconds']['synthesis'] / 10, short['seconds']['student'] / 8
  warmup = config.distill.distill_after
  rounds = max(warmup + 1, round((seconds + warmup * student) / (synthesis + student)))
  found = [*fields, f'distill.rounds={rounds}', f'evaluate.every={max(1, rounds // 10)}']
  if 'adversarial' in config.method:  # A ramp keeps its place in the run.
    ramp, share = config.method.adversarial, rounds / config.distill.rounds
    found += [f'method.adversarial.{name}={round(ramp[name] * share)}' for name in ('begin', 'end')]
  return tuple(found)


def row(name: str, method: str, fields: tuple[str, ...], options: argparse.Namespace) -> str:
  """A line of the table: mean and spread over the seeds."""
  folder = options.workdir / name.lower().replace(' ', '_').replace(',', '')
  fields = fields_for(options.seconds, method, folder / 'short', fields)
  found = [summary_of(method, folder / f'seed{seed}', (*fields, f'seed={seed}')) for seed in options.seeds]
  last = [100 * summary['student']['last']['top1'] for summary in found]
  mean_of = lambda value: statistics.mean(map(value, found))
  spread = f' ± {statistics.stdev(last):.2f}' if len(last) > 1 else ''
  teacher = found[0]['teacher']['top1']
  parts = ('synthesis', 'student', 'evaluation', 'compile')
  seconds = ' / '.join(f'{mean_of(lambda summary, part=part: summary["seconds"][part]):.0f}' for part in parts)
  mean, agreement = statistics.mean(last), 100 * mean_of(lambda summary: summary['student']['last']['agreement'])
  rounds, wall = found[0]['student']['last']['round'], mean_of(lambda summary: summary['wall_seconds'])
  return (f'| {name} | {mean:.2f}{spread} | {mean / teacher / 100:.3f} | {agreement:.2f} | {rounds} | {seconds} | '
          f'{wall:.0f} |')


def run() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seconds', type=float, default=300.0, help='of synthesis and student steps, for each run')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--methods', nargs='+', default=METHODS, choices=METHODS)
  parser.add_argument('--ablations', action='store_true', help='of SSD-KD, instead of the methods')
  parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/methods'))
  options = parser.parse_args()
  options.workdir = options.workdir.absolute()
  print('| method | student, % | student / teacher | agreement, % | rounds | '
        'synthesis / student / evaluation / compile, s | wall, s |')
  print('|---|---|---|---|---|---|---|')
  rows = [(name, 'ssd_kd', fields) for name, fields in ABLATIONS.items()] if options.ablations else [
      (method, method, ()) for method in options.methods]
  for name, method, fields in rows:
    print(row(name, method, fields, options), flush=True)


if __name__ == '__main__':
  run()
