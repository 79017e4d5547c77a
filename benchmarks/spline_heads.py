r"""Compares initialisations of a student's fully connected head on synthetic images of its teacher.

python benchmarks/spline_heads.py --data=digits --workdir=runs/heads_digits
python benchmarks/spline_heads.py --data=fashion_mnist --data_dir=DATA --workdir=runs/heads_fashion

Digits are of scikit-learn. The teacher of Fashion-MNIST is trained on its training images, which
`python -m dfkd_jax.prepare` writes to DATA. A teacher 'stack' has two hidden dense layers, and a
teacher 'pooled' one dense layer after a mean. FastDFKD makes a pool of images from it, without a
student and without data. Students are trained on the pool for a few epochs. Then each arm begins at
the same student with another head of the same shape:

  random           weights by He, as at the start of any training
  zero read-out    weights by Xavier, and a read-out of zeros
  ridge            a linear map in closed form
  random features  random units, and a linear map of them in closed form
  spline           hinges of one feature each
  linear + spline  a linear map and hinges
  sparse           the same; weights of 0 stay 0
  kept             the head that was trained along with the student

The rate of Adam is tuned for each arm on held-out images of the pool, with the first seed. All arms
of a seed see the same batches, in one process. Seconds are those of the fit and of the steps. All
arms of a seed take the same time a step, the median of all of them. An arm that never reaches an
accuracy counts as if it did so at its last step.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from synthetic_pool import (
    BATCH,
    CASES,
    CLASSES,
    QUICK,
    apply,
    load,
    make_pool,
    make_sets,
    make_start,
    make_teacher,
    optimizer,
    scores,
    train,
)

from dfkd_jax import distill, models, report, spline
from dfkd_jax.losses import divergence
from dfkd_jax.spline.network import rescale, widen

ARMS = (
    'random', 'zero read-out', 'ridge', 'random features', 'spline', 'linear + spline', 'sparse',
    'kept')
UNFITTED = ('random', 'zero read-out', 'kept')
CONTROLS, REGIMES = ('random', 'ridge', 'random features'), ('head only', 'joint')
NAMES = 'fc_hidden', 'fc'  # Layers of the head.
FITS = 3  # Repeats of each fit.
METRICS = ('accuracy', 'kl', 'kl at 0', 'steps to 99 %', 'seconds to 99 %')


def init_head(arm, features, logits, width, key, kept):
  """Parameters of a hidden layer and a read-out, and the number of terms.

  Of the fits, only 'spline' has no ridge penalty: its pruning takes the place.
  """
  init, size = jax.nn.initializers, features.shape[1]
  if arm == 'kept':
    return kept, 0
  if arm in ('random', 'zero read-out'):
    first, last = jax.random.split(key)
    he, zeros = init.he_normal(), init.zeros
    hidden, read_out = (he, he) if arm == 'random' else (init.glorot_uniform(), zeros)
    return {'Dense_0': {'kernel': hidden(first, (size, width)), 'bias': jnp.zeros(width)},
            'Dense_1': {'kernel': read_out(last, (width, CLASSES)), 'bias': jnp.zeros(CLASSES)}}, 0
  if arm == 'spline':
    model = spline.hinge_fit(
        features, logits - logits.mean(1, keepdims=True), max_terms=1 + 2 * width, num_knots=20,
        threshold=1e-4, keep=width)
    params = rescale(widen(spline.relu_network(model, size), width, key))
    return jax.tree.map(np.float32, params), model.num_terms
  kind = {'ridge': 'ridge', 'random features': 'random_features'}.get(arm, 'spline')
  return spline.fit_head(kind, features, logits, width, key)


def grid(steps):
  """Steps at which an arm is measured: 0, 1, 2, 3, 5, 7, ... and the last."""
  points = {round(1.4**i) for i in range(64)}
  return [0, *sorted(point for point in points if point < steps), steps]


def run_arm(start, arm, params, regime, rate, sets, points, clock):
  """Trains one arm; returns the records of all points, and the seconds a step."""
  head = {name: params[f'Dense_{i}'] for i, name in enumerate(NAMES)}
  network = models.bind(
      spline.ReluNetwork(params['Dense_0']['bias'].shape, CLASSES), {'params': params})
  inputs, mask = start.features, spline.hinge_mask(params)
  if regime == 'joint':
    network = start.student.replace(params={**start.student.params, **head})
    inputs = {name: images for name, (images, *_) in sets.items()}
    mask = jax.tree.map(np.ones_like, start.student.params) | {
        name: mask[f'Dense_{i}'] for i, name in enumerate(NAMES)}
  mask = jax.tree.map(np.float32, mask) if arm == 'sparse' else None
  network = jax.tree.map(jnp.array, network)  # On the device before the clock starts.
  student, records, seconds = distill.init(network, optimizer(rate, mask=mask)), [], 0.0
  step = functools.partial(
      train, key=start.key, inputs=jnp.asarray(inputs['pool']), targets=sets['pool'][1], rate=rate,
      num_steps=math.inf, mask=mask, loss=divergence.kl, batch_size=BATCH)
  jax.block_until_ready(step(student, 0, 1))  # Compiles.
  for first, last in itertools.pairwise([0, *points]):
    began = clock()
    student = jax.block_until_ready(step(student, first, last))
    seconds += clock() - began
    kl, accuracy = scores(student.network, inputs['test'], *sets['test'][1:])
    held_out = scores(student.network, inputs['held out'], *sets['held out'][1:])[0]
    records.append({'step': last, 'accuracy': accuracy, 'kl': kl, 'held_out': held_out})
  return records, seconds / points[-1]


def fit_heads(start, case, seed, sets, clock):
  """Returns parameters, number of terms and seconds of the fit by arm."""
  rows = np.random.default_rng(seed).permutation(len(start.features['pool']))[:case.fit_images]
  images, logits = sets['pool'][0][rows], np.asarray(sets['pool'][1][rows])
  kept, heads = {f'Dense_{i}': start.student.params[name] for i, name in enumerate(NAMES)}, {}
  key = jax.random.fold_in(start.key, 1 << 30)  # apart from those of the steps' batches
  for arm in ARMS:
    if arm == 'sparse':
      heads[arm] = heads['linear + spline']  # the same fit, trained with a mask
      continue
    seconds = []
    for _ in range(FITS):  # The least time is the one least disturbed; the first fit may compile.
      began = clock()
      features = start.features['pool'] if arm in UNFITTED else apply(start.student, images)[1]
      params, terms = init_head(arm, features, logits, case.width, key, kept)
      params = jax.block_until_ready(params)
      seconds.append(clock() - began)
    heads[arm] = params, int(terms), min(seconds)
  return heads


def run_seed(case, seed, sets, rates, path, clock):
  """Runs all arms of a seed in both regimes.

  `rates` maps regime and arm to the candidates; with several, the best one takes their place.
  """
  start, runs = make_start(case, seed, sets, path), []
  heads = fit_heads(start, case, seed, sets, clock)
  for regime in REGIMES:
    own, paces = [], []
    for arm, (params, terms, seconds) in heads.items():
      run = functools.partial(run_arm, start, arm, params, regime, sets=sets, clock=clock)
      if len(rates[regime, arm]) > 1:
        rates[regime, arm] = [min(rates[regime, arm], key=lambda rate: run(
            rate, points=[case.steps])[0][-1]['held_out'])]
      rate, = rates[regime, arm]
      records, pace = run(rate, points=grid(case.steps))
      paces.append(pace)
      own.append({'seed': seed, 'regime': regime, 'arm': arm, 'rate': rate, 'terms': terms,
                  'fit': seconds, 'records': records})
    summarize(own, float(np.median(paces)))
    runs += own
    print(f'seed {seed}, {regime}:', *(f'{run["arm"]} {run["accuracy"]:.4f}' for run in own),
          sep=' | ', flush=True)
  return runs


def summarize(runs, pace):
  """Adds, to the runs of one seed and regime, when they reach shares of the best accuracy."""
  best = max(run['records'][-1]['accuracy'] for run in runs)
  for run in runs:
    first, last = run['records'][0], run['records'][-1]
    run |= {'accuracy at 0': first['accuracy'], 'accuracy': last['accuracy'],
            'kl at 0': first['kl'], 'kl': last['kl']}
    for share in (95, 99):
      steps = [at['step'] for at in run['records'] if 100 * at['accuracy'] >= share * best]
      run[f'reached {share} %'] = bool(steps)
      run[f'steps to {share} %'] = step = min(steps, default=last['step'])
      run[f'seconds to {share} %'] = run['fit'] + step * pace


def interval(differences):
  """Mean, and 95 % bootstrap interval of the mean over seeds."""
  draws = np.random.default_rng(0).choice(differences, (10_000, len(differences)))
  return [float(np.mean(differences)), *map(float, np.quantile(draws.mean(1), (0.025, 0.975)))]


def compare(runs):
  """Paired differences of both splines to both controls, by regime, arm, control and metric."""
  value = {(run['regime'], run['arm'], run['seed']): run for run in runs}
  seeds = sorted({run['seed'] for run in runs})
  return [{'regime': regime, 'arm': arm, 'control': control} | {
      metric: interval([value[regime, arm, seed][metric] - value[regime, control, seed][metric]
                        for seed in seeds]) for metric in METRICS}
          for regime in REGIMES for arm in ('spline', 'linear + spline') for control in CONTROLS]


def display(name, value):
  """Formats a value of a column; accuracies in %."""
  kind = name.split()[0]
  factor, form = {'accuracy': (100, '.2f'), 'kl': (1, '.3f'), 'rate': (1, 'g'), 'fit': (1, '.3f'),
                  'seconds': (1, '.2f')}.get(kind, (1, '.0f'))
  return format(factor * value, form)


def markdown(runs, paired):
  """Formats means of all arms, and the differences with their intervals."""
  columns = ('rate', 'terms', 'fit', 'accuracy at 0', 'accuracy', 'kl at 0', 'kl', 'steps to 95 %',
             'steps to 99 %', 'seconds to 95 %', 'seconds to 99 %')
  rule, lines = lambda names: '|---' * (len(names) + 1) + '|', []
  for regime in REGIMES:
    lines += [f'\n| {regime} | {" | ".join(columns)} |', rule(columns)]
    for arm in ARMS:
      own = [run for run in runs if (run['regime'], run['arm']) == (regime, arm)]
      cells = [display(name, np.mean([run[name] for run in own])) for name in columns]
      missed = sum(not run['reached 99 %'] for run in own)
      lines.append(f'| {arm} | {" | ".join(cells)}{f" ({missed} never)" if missed else ""} |')
  lines += [f'\n| difference | {" | ".join(METRICS)} |', rule(METRICS)]
  for row in paired:
    cells = ['{} [{}, {}]'.format(*(display(name, value) for value in row[name]))
             for name in METRICS]
    lines.append(f'| {row["regime"]}: {row["arm"]} - {row["control"]} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', choices=CASES, default='digits')
  parser.add_argument('--data_dir', help='prepared training images of Fashion-MNIST')
  parser.add_argument('--teacher', choices=('stack', 'pooled'), default='stack')
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--rates', type=float, nargs='+', default=[3e-4, 1e-3, 3e-3, 1e-2])
  parser.add_argument('--clock', choices=('wall', 'cpu'), default='wall',
                      help='cpu: seconds of the process, for one core that others use as well')
  parser.add_argument('--quick', action='store_true', help='a few steps, to see that it runs')
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  options = parser.parse_args(argv)
  case, seeds, rates = CASES[options.data], options.seeds, options.rates
  if options.quick:
    case, seeds, rates = case._replace(**QUICK), min(2, seeds), rates[:2]
  clock = {'wall': time.perf_counter, 'cpu': time.process_time}[options.clock]
  folder = options.workdir
  folder.mkdir(parents=True, exist_ok=True)
  real, (test, labels) = load(options.data, options.data_dir)
  teacher = make_teacher(case, options.teacher, *real, folder / 'teacher.safetensors')
  pool = make_pool(case, teacher, folder / 'pool.npz')
  sets = make_sets(teacher, pool, test, labels)
  accuracy = scores(teacher, *sets['test'])[1]
  print(f'Teacher {accuracy:.4f}, {len(pool)} synthetic images', flush=True)
  tuned, runs = {(regime, arm): rates for regime in REGIMES for arm in ARMS}, []
  for seed in range(seeds):
    runs += run_seed(case, seed, sets, tuned, folder / f'student{seed}.safetensors', clock)
  paired = compare(runs)
  text = json.dumps({'options': vars(options) | {'workdir': str(folder)}, 'case': case._asdict(),
                     'device': report.device(), 'versions': report.versions(),
                     'teacher': accuracy, 'runs': runs, 'paired': paired}, indent=1)
  (folder / 'results.json').write_text(text)
  print(markdown(runs, paired))


if __name__ == '__main__':
  main()
