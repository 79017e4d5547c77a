"""One of several processes of a test: runs the jobs of a file in turn, and writes their results.

python one_process.py JOBS PROCESS_ID
"""

import json
import os
import pathlib
import pickle
import signal
import sys

from ml_collections import config_dict

from dfkd_jax import report, train


def stop_after(rounds: int | None) -> None:
  """Interrupts the run one round after `rounds`, before that round is saved."""
  original, done = report.Progress.update, []

  def update(self, **numbers):
    done.append(numbers)
    if len(done) == rounds + 1:
      report.Progress.update = original
      raise KeyboardInterrupt
    original(self, **numbers)

  if rounds is not None:
    report.Progress.update = update


def signal_to(where: int | None, process_id: int) -> None:
  """Sends SIGTERM to one process in its first round."""
  original = report.Progress.update

  def update(self, **numbers):
    report.Progress.update = original
    os.kill(os.getpid(), signal.SIGTERM)
    original(self, **numbers)

  if where == process_id:
    report.Progress.update = update


def refuse_metrics(where: int | None, process_id: int) -> None:
  """Lets the disk of one process be full when the second line of metrics is written."""
  original, lines = report.MetricsWriter.write, []

  def write(self, step, **numbers):
    lines.append(step)
    if len(lines) == 2:
      report.MetricsWriter.write = original
      raise ValueError('Cannot write metrics.jsonl: No space left on device.')
    original(self, step, **numbers)

  if where == process_id:
    report.MetricsWriter.write = write


def main(jobs: pathlib.Path, process_id: int) -> None:
  results = []
  for job in pickle.loads(jobs.read_bytes()):
    fields = job['config'] | job['changes'].get(process_id, {})
    config = config_dict.ConfigDict(fields)
    config.distributed.process_id = process_id
    stop_after(job['stop_after'])
    signal_to(job['signalled'], process_id)
    refuse_metrics(job['full'], process_id)
    try:
      results.append(train.run(config, job['workdir'], signals=True))
    except (ValueError, KeyboardInterrupt) as error:
      results.append(f'{type(error).__name__}: {error}')
  jobs.with_name(f'results-{process_id}.json').write_text(json.dumps(results))


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
