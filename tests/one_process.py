"""One of several processes that a test starts: runs the jobs of a file in turn, and leaves what came of them.

python one_process.py JOBS PROCESS_ID
"""

import json
import pathlib
import pickle
import sys

from ml_collections import config_dict

from dfkd_jax import report, train


def stop_after(rounds: int | None) -> None:
  """Interrupts the run when so many rounds and one more are done, of which the last is not saved."""
  original, done = report.Progress.update, []

  def update(self, **numbers):
    done.append(numbers)
    if len(done) == rounds + 1:
      report.Progress.update = original
      raise KeyboardInterrupt
    original(self, **numbers)

  if rounds is not None:
    report.Progress.update = update


def main(jobs: pathlib.Path, process_id: int) -> None:
  results = []
  for job in pickle.loads(jobs.read_bytes()):
    fields = job['config'] | job['own'].get(process_id, {})
    config = config_dict.ConfigDict(fields)
    config.distributed.process_id = process_id
    stop_after(job['stop_after'])
    try:
      results.append(train.run(config, job['workdir']))
    except (ValueError, KeyboardInterrupt) as error:
      results.append(f'{type(error).__name__}: {error}')
  jobs.with_name(f'results-{process_id}.json').write_text(json.dumps(results))


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
