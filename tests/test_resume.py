"""What a run stands on: it goes on with the same weights and the same factors, or not at all."""

import jax
import numpy as np
import pytest
import toy_runs
from toy_runs import stopped

from dfkd_jax import build, models, preflight, tasks, train
from dfkd_jax.models import pretrained


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


def teacher_of(seed, path):
  """Weights like those of the toy teacher, but others."""
  network = models.create_network(
      models.create('convnet', toy_runs.CLASSES, **toy_runs.NETWORKS['teacher']), jax.random.key(seed), toy_runs.IMAGE)
  pretrained.save_safetensors(
      path, {'params': network.params, 'batch_stats': toy_runs.moved(network.batch_stats)})
  return str(path)


@pytest.mark.parametrize('rounds', [3, 5])
def test_other_weights_in_the_same_file_are_another_run(tmp_path, rounds):
  """While it goes on, and when it has come to its end."""
  source, config = str(tmp_path / 'teacher.safetensors'), toy_runs.config
  teacher_of(1, source)
  stopped(config(teacher__source=source), tmp_path / 'run', rounds) if rounds < 5 else train.run(
      config(teacher__source=source), tmp_path / 'run')
  before = toy_runs.tree_of(tmp_path / 'run')
  teacher_of(2, source)
  with pytest.raises(ValueError, match=r'holds a run with another teacher, of SHA-256 \w{16} there, \w{16} here'):
    train.run(config(teacher__source=source), tmp_path / 'run')
  assert toy_runs.tree_of(tmp_path / 'run') == before


def test_a_judge_and_the_teacher_of_a_training_are_weights_too(tmp_path):
  first, second = (teacher_of(seed, tmp_path / f'{seed}.safetensors') for seed in (1, 2))
  made = toy_runs.config(distill__rounds=2, judge__name='convnet', judge__source=first)
  made.judge.options = toy_runs.NETWORKS['teacher']
  train.run(made, tmp_path / 'judged')
  (tmp_path / '1.safetensors').write_bytes((tmp_path / '2.safetensors').read_bytes())
  with pytest.raises(ValueError, match='another judge'):
    train.run(made, tmp_path / 'judged')
  made = toy_runs.config(job='train', train__epochs=1, train__teacher_factor=1.0, teacher__source=second)
  assert train.run(made, tmp_path / 'trained')['weights'] == {'teacher': pretrained.describe(
      build.teacher(made), second).sha256}
  teacher_of(3, second)
  with pytest.raises(ValueError, match='another teacher'):
    train.run(made, tmp_path / 'trained')


def test_a_run_that_goes_on_keeps_the_factors_it_began_with(tmp_path, monkeypatch):
  config = toy_runs.config()
  stopped(config, tmp_path, 3)
  monkeypatch.setattr(preflight, 'report', lambda *_: pytest.fail('The teacher was looked at again.'))
  summary = train.run(config, tmp_path)
  assert summary['preflight']['factors']['batch_norm'] == 10.0
  assert summary['seconds']['preflight'] > 0  # Of the time before.


def test_each_process_may_have_images_of_its_own(monkeypatch):
  """As two processes do, one after the other: the sums are those of all."""
  from dfkd_jax import evaluate, parallel

  draw = np.random.default_rng(0)
  network = build.teacher(toy_runs.config())
  images = draw.integers(0, 256, (11, *toy_runs.IMAGE), np.uint8)
  labels, task = draw.integers(0, 5, 11), tasks.classification(5)
  wanted = evaluate.evaluate(network, (images, labels), task=task, batch_size=4, teacher=network)
  said = []
  monkeypatch.setattr(parallel, 'of_processes', lambda array: said.append(array) or np.asarray(array)[None])
  answers = [evaluate.predict(network, images[rank::2], batch_size=4, shared=True) for rank in (0, 1)]
  np.testing.assert_array_equal(np.sort(np.concatenate(answers)), np.sort(evaluate.predict(network, images)))
  said.clear()
  for rank in (0, 1):
    evaluate.evaluate(network, (images[rank::2], labels[rank::2]), task=task, batch_size=4, shared=True,
                      teacher_predictions=answers[rank])
  half = len(said) // 2
  monkeypatch.setattr(parallel, 'of_processes', lambda array: np.stack(pairs.pop(0)))
  pairs = list(zip(said[:half], said[half:], strict=True))
  found = evaluate.evaluate(network, (images[::2], labels[::2]), task=task, batch_size=4, shared=True,
                            teacher_predictions=answers[0])
  assert found == pytest.approx(wanted)
  assert found['count'] == 11
