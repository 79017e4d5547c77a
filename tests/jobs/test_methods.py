"""Every method through whole runs: with real images, without any, with a judge, from an old run.

A new file in synth/methods is picked up without an edit here.
"""

import numpy as np
import pytest
import toy_runs
from method_runs import ALIKE
from ml_collections import config_dict

from dfkd_jax import synth, train

NUMBERS = dict(
    num_steps=1, latent_dim=7, batch_size=4, capacity=8, num_tasks=1, bank_size=8, num_negatives=3,
    projection_size=5, adversarial_after=0)


@pytest.fixture(autouse=True, scope='module')
def _quick():
  with toy_runs.quick():
    yield


def config(name, **changes):
  """Two rounds of two student steps; the method takes the numbers that it knows."""
  made = toy_runs.config(
      distill__rounds=2, distill__steps_per_round=2, distill__distill_after=0, **changes)
  with made.unlocked():
    made.method = config_dict.ConfigDict(
        {'name': name, **{field: value for field, value in NUMBERS.items()
                          if field in synth.parameters(name)}})
  if 'contrast_temperature' in synth.parameters(name):
    made.factors.contrast = 0.5
  return made


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.exhaustive) if name in ALIKE else name
    for name in synth.names()])
def test_whole_runs(name, tmp_path):
  summary = train.run(config(name), tmp_path / 'first')
  assert 0 <= summary['student']['last']['top1'] <= 1
  assert (tmp_path / 'first' / 'images.png').stat().st_size > 0

  source, judge = str(tmp_path / 'first'), toy_runs.teacher_file((4,))
  changes = dict(
      dataset__name=None, init_from__student=source, judge__name='convnet', judge__source=judge,
      judge__options=dict(widths=(4,), strides=(1,)))
  with_generator = config(name, init_from__generator=source, **changes)
  if 'generator' in synth.parameters(name):
    summary = train.run(with_generator, tmp_path / 'second')
  else:
    with pytest.raises(ValueError, match=r'init_from\.generator is'):
      train.run(with_generator, tmp_path / 'refused')
    summary = train.run(config(name, **changes), tmp_path / 'second')
  last = summary['student']['last']
  assert {'held_out_agreement', 'judge_top1', 'judge_top5'} <= last.keys()
  assert all(0 <= last[name] <= 1 for name in last.keys() - {'round'})
  assert np.isfinite(list(summary['images'].values())).all()
  assert 'init_from.student' in summary['weights']
