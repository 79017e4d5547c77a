"""The benchmark of heads: when arms reach an accuracy, paired intervals, and the fitted heads."""

import json
import sys

import jax
import numpy as np
import pytest
import toy_runs

from dfkd_jax import spline

sys.path.insert(0, str(toy_runs.ROOT / 'benchmarks'))
import spline_heads


def run_of(arm, seed, accuracies, fit=0.0, regime='joint'):
  records = [{'step': 10 * i, 'accuracy': accuracy, 'kl': 1 - accuracy, 'held_out': 0.0}
             for i, accuracy in enumerate(accuracies)]
  return {'regime': regime, 'arm': arm, 'seed': seed, 'rate': 0.1, 'terms': 3, 'fit': fit,
          'records': records}


def test_times_are_of_the_fit_and_of_the_steps():
  runs = [run_of('spline', 0, (0.0, 0.95, 0.99, 1.0), fit=7.0),
          run_of('ridge', 0, (0.1, 0.2, 0.3, 0.4), fit=1.0)]
  spline_heads.summarize(runs, pace=0.5)
  fast, slow = runs
  assert (fast['steps to 95 %'], fast['steps to 99 %']) == (10, 20)
  assert (fast['seconds to 95 %'], fast['seconds to 99 %']) == (12.0, 17.0)
  assert fast['reached 99 %']
  assert not slow['reached 95 %']  # Counts as if it did at the last step.
  assert (slow['steps to 95 %'], slow['seconds to 99 %']) == (30, 16.0)
  assert (slow['accuracy at 0'], slow['kl at 0'], slow['accuracy']) == (0.1, 0.9, 0.4)


def test_intervals_are_paired_by_seed():
  """Seeds differ far more than arms; a comparison without pairs would find nothing."""
  runs = []
  for regime in spline_heads.REGIMES:
    for seed in range(5):
      own = [run_of(arm, seed, (0.1 * seed, 0.1 * seed + 0.01 * i), regime=regime)
             for i, arm in enumerate(spline_heads.ARMS)]
      spline_heads.summarize(own, pace=1.0)
      runs += own
  rows = spline_heads.compare(runs)
  assert len(rows) == 2 * 2 * 3
  row, = (row for row in rows if row['regime'] == 'joint' and row['arm'] == 'linear + spline'
          and row['control'] == 'ridge')
  assert row['accuracy'] == pytest.approx([0.03, 0.03, 0.03])
  assert row['kl'] == pytest.approx([-0.03, -0.03, -0.03])
  text = spline_heads.markdown(runs, rows)
  assert '| joint: linear + spline - ridge | 3.00 [3.00, 3.00] | -0.030 [-0.030, -0.030] |' in text
  assert '(5 never)' in text


def test_an_interval_covers_the_mean_of_the_seeds():
  mean, low, high = spline_heads.interval([1.0, 2.0, 3.0, 4.0])
  assert mean == 2.5
  assert 1 < low < 2 < 3 < high < 4
  assert low + high == pytest.approx(5, abs=0.3)


@pytest.mark.exhaustive
def test_it_runs_from_end_to_end(tmp_path, capsys):
  pytest.importorskip('sklearn')
  spline_heads.main(['--quick', f'--workdir={tmp_path}'])
  assert '| head only: spline - ridge |' in capsys.readouterr().out
  results = json.loads((tmp_path / 'results.json').read_text())
  assert {run['arm'] for run in results['runs']} == set(spline_heads.ARMS)
  assert results['case']['width'] == 24


def test_arms_have_equal_shapes_and_a_grid_ends_at_the_last_step():
  rng = np.random.default_rng(0)
  features, logits = rng.uniform(size=(200, 5)), rng.normal(size=(200, 10))
  key, kept = jax.random.key(0), {'Dense_0': None}
  shapes = lambda tree: jax.tree.map(np.shape, tree)
  heads = {arm: spline_heads.init_head(arm, features, logits, 23, key, kept)[0]
           for arm in spline_heads.ARMS}
  assert heads.pop('kept') is kept
  assert all(shapes(head) == shapes(heads['random']) for head in heads.values())
  assert heads['random']['Dense_0']['kernel'].shape == (5, 23)
  assert not heads['zero read-out']['Dense_1']['kernel'].any()
  model = spline.hinge_fit(features, logits - logits.mean(1, keepdims=True), max_terms=47,
                           num_knots=20, threshold=1e-4, keep=23)
  values = spline.ReluNetwork((23,), 10).apply({'params': heads['spline']}, features)
  np.testing.assert_allclose(values, model.predict(features), atol=1e-3)
  assert spline_heads.grid(9) == [0, 1, 2, 3, 4, 5, 8, 9]
