"""Runs resume with the same weights, factors and bits, or begin with those of an old run."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy_runs
from toy_runs import equal, stopped

from dfkd_jax import models, tasks, train, weights
from dfkd_jax.config import build
from dfkd_jax.config.problems import InvalidError
from dfkd_jax.config.records import resolve
from dfkd_jax.jobs import preflight
from dfkd_jax.runs.loop import Experiment
from dfkd_jax.runs.state import RunState


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


def teacher_of(seed, path):
  """Weights like those of the toy teacher, but others."""
  network = models.create_network(
      models.create('convnet', toy_runs.CLASSES, **toy_runs.NETWORKS['teacher']),
      jax.random.key(seed), toy_runs.IMAGE)
  weights.save_safetensors(
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
  with pytest.raises(ValueError,
      match=r"weights\.teacher is '\w+ \.\.\. \w+' there, '.* here\. .*force:teacher\.source\.$"):
    train.run(config(teacher__source=source), tmp_path / 'run')
  assert toy_runs.tree_of(tmp_path / 'run') == before


@pytest.mark.exhaustive
def test_a_judge_and_the_teacher_of_a_training_are_weights_too(tmp_path):
  first, second = (teacher_of(seed, tmp_path / f'{seed}.safetensors') for seed in (1, 2))
  made = toy_runs.config(distill__rounds=2, judge__name='convnet', judge__source=first)
  made.judge.options = toy_runs.NETWORKS['teacher']
  train.run(made, tmp_path / 'judged')
  (tmp_path / '1.safetensors').write_bytes((tmp_path / '2.safetensors').read_bytes())
  with pytest.raises(ValueError, match=r'weights\.judge is '):
    train.run(made, tmp_path / 'judged')
  made = toy_runs.config(job='train', train__epochs=1, train__teacher_factor=1.0,
      teacher__source=second)
  assert train.run(made, tmp_path / 'trained')['weights'] == {'teacher': weights.describe(
      build.trained_network(resolve(made).teacher), second).sha256}
  teacher_of(3, second)
  with pytest.raises(ValueError, match=r'weights\.teacher is '):
    train.run(made, tmp_path / 'trained')


def test_a_run_that_goes_on_keeps_the_factors_it_began_with(tmp_path, monkeypatch):
  config = toy_runs.config(preflight__enabled=True)
  stopped(config, tmp_path, 3)
  monkeypatch.setattr(preflight, 'report',
      lambda *_: pytest.fail('The teacher was looked at again.'))
  summary = train.run(config, tmp_path)
  assert summary['preflight']['factors']['batch_norm'] == 10.0
  assert summary['seconds']['preflight'] > 0  # Of the time before.


def test_each_process_may_have_images_of_its_own(monkeypatch):
  """As two processes do, one after the other: the sums are those of all."""
  from dfkd_jax import evaluate, parallel

  draw = np.random.default_rng(0)
  network = build.trained_network(resolve(toy_runs.config()).teacher)
  images = draw.integers(0, 256, (11, *toy_runs.IMAGE), np.uint8)
  labels, task = draw.integers(0, 5, 11), tasks.classification(5)
  wanted = evaluate.evaluate(network, (images, labels), task=task, batch_size=4, teacher=network)
  said = []
  monkeypatch.setattr(parallel, 'gather_processes',
      lambda array: said.append(array) or np.asarray(array)[None])
  answers = [evaluate.predict(network, images[rank::2], batch_size=4, shared=True)
      for rank in (0, 1)]
  np.testing.assert_array_equal(np.sort(np.concatenate(answers)),
      np.sort(evaluate.predict(network, images)))
  said.clear()
  for rank in (0, 1):
    evaluate.evaluate(network, (images[rank::2], labels[rank::2]), task=task, batch_size=4,
        shared=True,
                      teacher_predictions=answers[rank])
  half = len(said) // 2
  monkeypatch.setattr(parallel, 'gather_processes', lambda array: np.stack(pairs.pop(0)))
  pairs = list(zip(said[:half], said[half:], strict=True))
  found = evaluate.evaluate(network, (images[::2], labels[::2]), task=task, batch_size=4,
      shared=True,
                            teacher_predictions=answers[0])
  assert found == pytest.approx(wanted)
  assert found['count'] == 11


def test_the_best_student_is_that_of_its_round(tmp_path, monkeypatch):
  """Its scores fall after the third round; the run is stopped after that, and resumes."""
  scores = iter([0.1, 0.2, 0.9, 0.3, 0.3, 0.2])
  monkeypatch.setattr(Experiment, 'evaluate', lambda self,
      network: {'top1': next(scores), 'count': 23.0})
  monkeypatch.setattr(Experiment, 'cache_teacher_predictions', lambda self, teacher: None)
  seen = []

  def record_metrics(self, metrics, done, state, selection):
    seen.append(jax.device_get(state.student.network))
    recorded(self, metrics, done, state, selection)

  recorded = RunState.record_metrics
  monkeypatch.setattr(RunState, 'record_metrics', record_metrics)
  stopped(toy_runs.config(), tmp_path, 5)
  summary = train.run(toy_runs.config(), tmp_path)
  assert summary['student']['best']['round'] == 3
  module = build.module(resolve(toy_runs.config()).student)
  best = weights.load(tmp_path / 'student_best.safetensors', module, toy_runs.IMAGE)
  last = weights.load(tmp_path / 'student.safetensors', module, toy_runs.IMAGE)
  assert equal(jax.device_get(best['params']), seen[2].params)
  assert equal(jax.device_get(last['params']), seen[5].params)
  assert not equal(seen[2].params, seen[5].params)
  found = weights.load(f'{tmp_path / "checkpoints"}#best', module, toy_runs.IMAGE)
  assert equal(jax.device_get(found), jax.device_get(best))


def test_without_the_best_there_is_no_file_of_it(tmp_path):
  summary = train.run(toy_runs.config(distill__rounds=2, checkpoint__keep_best=False), tmp_path)
  assert 'student_best.safetensors' not in summary['files']
  assert not (tmp_path / 'student_best.safetensors').exists()


def test_a_run_goes_on_with_chosen_fields_changed(tmp_path):
  stopped(toy_runs.config(), tmp_path, 3)
  other = toy_runs.config(distill__rounds=6, distill__temperature=5.0)
  with pytest.raises(ValueError,
      match=r'distill\.rounds is 5 there, 6 here; distill\.temperature is 4\.0 there, 5\.0'):
    train.run(other, tmp_path)
  with pytest.raises(
      ValueError, match=r'config: distill\.temperature .*--resume=force:distill\.temperature\.$'):
    train.run(other, tmp_path, resume='force:distill.rounds')
  with pytest.raises(
      ValueError, match=r"Unknown field 'distill\.round'\. Did you mean 'distill\.rounds'"):
    train.run(other, tmp_path, resume='force:distill.round')
  with pytest.raises(ValueError, match="resume is 'forced', must be 'force'"):
    train.run(other, tmp_path, resume='forced')
  # All that is wrong at once, and each field once.
  with pytest.raises(InvalidError) as error:
    train.run(toy_runs.config(seed=1, labels='blanced', distill__temperature=-5.0), tmp_path)
  labels, temperature, folder = error.value.problems
  assert 'distill.temperature is -5.0, must be a number in' in temperature
  assert "'blanced', must be one of" in labels
  assert "Did you mean 'balanced'" in labels
  assert 'another config: seed is 0 there, 1 here. Name' in folder
  summary = train.run(other, tmp_path, resume='force:distill')
  assert summary['student']['last']['round'] == 6
  assert summary['changed'] == [{'after': 2, 'fields': {
      'distill.rounds': {'there': 5, 'here': 6},
      'distill.temperature': {'there': 4.0, 'here': 5.0}}}]
  assert toy_runs.metrics(tmp_path)[:2] == toy_runs.whole()[1][:2]
  # Now it is a run of this config.
  assert train.run(other, tmp_path)['student'] == summary['student']


def test_a_finished_run_may_be_made_longer(tmp_path):
  train.run(toy_runs.config(), tmp_path)
  summary = train.run(toy_runs.config(distill__rounds=7), tmp_path, resume='force:distill.rounds')
  assert summary['student']['last']['round'] == 7
  assert [line['step'] for line in toy_runs.metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
  assert json.loads((tmp_path / 'summary_after_5.json').read_text())['config']['distill'][
      'rounds'] == 5
  with pytest.raises(ValueError, match='another architecture'):
    train.run(toy_runs.config(distill__rounds=8, method__capacity=16), tmp_path, resume='force')


def test_a_folder_is_of_one_process_at_a_time(tmp_path):
  script = (
      'import sys, pathlib\nfrom dfkd_jax.runs import folder\n'
      f'with folder.lock(pathlib.Path({str(tmp_path)!r})):\n'
      '  print("here", flush=True)\n  sys.stdin.read()\n')
  with subprocess.Popen([sys.executable, '-c', script], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
                        cwd=toy_runs.ROOT) as other:
    assert other.stdout.readline() == b'here\n'
    with pytest.raises(ValueError, match=f'Another process is running in {tmp_path}'):
      train.run(toy_runs.config(distill__rounds=2), tmp_path)
    assert not toy_runs.tree_of(tmp_path)
    other.kill()
  (tmp_path / 'summary.json.7.tmp').write_text('{')  # Of one that was killed while it wrote.
  (tmp_path / 'mine.tmp').write_text('')
  train.run(toy_runs.config(distill__rounds=2), tmp_path)
  assert [path.name for path in tmp_path.glob('*.tmp')] == ['mine.tmp']


def test_a_new_run_begins_with_an_old_ones_networks(tmp_path, monkeypatch):
  train.run(toy_runs.config(), tmp_path / 'old')
  begun, loop = [], Experiment.loop
  monkeypatch.setattr(Experiment, 'loop', lambda self, state, *rest: (
      begun.append(jax.device_get(state)) or loop(self, state, *rest)))
  new = toy_runs.config(
      distill__rounds=2, init_from__student=str(tmp_path / 'old'),
      init_from__generator=str(tmp_path / 'old'))
  summary = train.run(new, tmp_path / 'new')
  module = build.module(resolve(new).student)
  wanted = weights.load(tmp_path / 'old' / 'student.safetensors', module, toy_runs.IMAGE)
  assert equal(begun[0].student.network.params, jax.device_get(wanted['params']))
  generator = weights.read_subtree(weights.find_checkpoint(tmp_path / 'old' / 'checkpoints'),
      'synthesis/meta_params')
  mine = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(begun[0].synthesis.meta_params)}
  assert equal(mine, generator)
  assert int(begun[0].student.step) == int(begun[0].synthesis.step) == int(
      begun[0].synthesis.buffer.size) == 0
  assert set(summary['weights']) == {'teacher', 'judge', 'init_from.student', 'init_from.generator'}


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(init_from__student='nowhere'), r"init_from\.student is 'nowhere': there is no such file"),
    (dict(init_from__generator='nowhere'),
        r"init_from\.generator is 'nowhere', must be the folder of a run"),
    (dict(init_from__generator='OLD', generator__options=dict(width=3)),
     r"init_from\.generator is .*'params/.*must be"),
    (dict(init_from__student='OLD', student__options=dict(widths=(2, 4), strides=(1, 2))),
        r'init_from\.student is ')])
def test_what_cannot_be_taken_over_costs_a_line(tmp_path, changes, message):
  toy_runs.whole()
  changes = {name: str(toy_runs.folder() / 'whole') if value == 'OLD' else value for name,
      value in changes.items()}
  options = {name: changes.pop(name) for name in list(changes) if name.endswith('options')}
  config = toy_runs.config(**changes)
  for name, value in options.items():
    config[name.split('__')[0]].options = value
  with pytest.raises(ValueError, match=message) as error:
    train.run(config, tmp_path / 'run')
  assert len(str(error.value).splitlines()) == 1
  assert not (tmp_path / 'run').exists()
