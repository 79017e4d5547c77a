"""Times fits of hinges against py-earth2, in turn on the same data.

pip install -e '.[benchmarks]'
python benchmarks/spline.py --limit=300

The data are a random layer of 64 ReLU units and a linear map. Without py-earth2, only our column is
printed. Its fits run in a process of their own, which is ended after --limit seconds; the ratio is
then a lower bound.
"""

import argparse
import importlib.util
import json
import multiprocessing
import time

import numpy as np

from dfkd_jax import report, spline

CASES = {  # rows, features, responses, most terms
    'one response': (2000, 16, 1, 41),
    'ten responses, few terms': (2000, 16, 10, 21),
    'ten responses': (2000, 64, 10, 65),
}


def draw(rows: int, features: int, responses: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  x = rng.normal(size=(rows, features))
  hidden = x @ rng.normal(size=(features, 64)) / np.sqrt(features) + rng.normal(size=64)
  return x, np.maximum(hidden, 0) @ rng.normal(size=(64, responses)) / 8


def fit_ours(x, y, terms):
  return spline.hinge_fit(x, y, max_terms=terms, threshold=0).predict(x)


def fit_theirs(x, y, terms):
  from pyearth import Earth  # the package py-earth2

  # The same problem: its linear terms are switched off, which take one column where hinges take
  # two, and its limit is lower, since it adds a last pair beyond that.
  model = Earth(max_terms=terms - 2, thresh=0, allow_linear=False)
  return model.fit(x, y).predict(x).reshape(y.shape)


def timed(fit, x, y, terms):
  """Returns seconds, and the share of the variance that is not explained."""
  began = time.perf_counter()
  values = fit(x, y, terms)
  seconds = time.perf_counter() - began
  return seconds, np.square(y - values).sum() / np.square(y - y.mean(0)).sum()


def _send(pipe, *arguments):
  pipe.send(timed(*arguments))


def timed_apart(limit, *arguments):
  """Calls `timed` in a process that is ended after `limit` seconds; then returns (limit, None)."""
  context = multiprocessing.get_context('spawn')
  receiver, sender = context.Pipe(duplex=False)
  process = context.Process(target=_send, args=(sender, *arguments))
  process.start()
  sender.close()
  result = receiver.recv() if receiver.poll(limit) else (limit, None)
  process.kill()
  process.join()
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
  parser.add_argument('--repeats', type=int, default=1)
  parser.add_argument('--limit', type=float, default=300, help='seconds for a fit of py-earth2')
  options = parser.parse_args()
  has_theirs = importlib.util.find_spec('pyearth') is not None
  print('| case | rows x features x responses, terms | ours, s | py-earth2, s | ratio '
        '| unexplained, ours | py-earth2 |')
  print('|---|---|---|---|---|---|---|')
  for name in options.cases:
    *shape, terms = CASES[name]
    x, y = draw(*shape)
    for _ in range(options.repeats):
      ours, left = timed(fit_ours, x, y, terms)
      size = f'{" x ".join(map(str, shape))}, {terms}'
      row = [name, size, f'{ours:.2f}', '', '', f'{left:.4f}', '']
      if has_theirs:
        theirs, their_left = timed_apart(options.limit, fit_theirs, x, y, terms)
        more = '> ' * (their_left is None)
        row[3], row[4] = f'{more}{theirs:.1f}', f'{more}{theirs / ours:.0f}'
        row[6] = '' if their_left is None else f'{their_left:.4f}'
      print(f'| {" | ".join(row)} |', flush=True)
  print(json.dumps(report.device()))


if __name__ == '__main__':
  main()
