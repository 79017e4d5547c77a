import json

import jax
import numpy as np
import pytest
import toy_runs

from dfkd_jax import data, evaluate, report, train, weights
from dfkd_jax.config import build
from dfkd_jax.config.records import resolve

NEW = dict(
    job='train', dataset__name='grey', augment__student__name='shift', augment__student__pad=1,
    train__epochs=6,
    optimizer__learning_rate=0.1, optimizer__schedule='cosine_by_step', checkpoint__every=2)


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


def teacher_config(**changes):
  return toy_runs.config(**NEW | {'train__network': 'teacher'} | changes)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  """A teacher of brightness: workdir and summary."""
  workdir = tmp_path_factory.mktemp('teacher') / 'run'
  return workdir, train.run(teacher_config(), workdir, command='python main.py')


def weights_in(workdir):
  return weights.read(workdir / 'weights.safetensors')


def test_a_run_leaves_its_files_and_says_so(teacher):
  workdir, summary = teacher
  assert sorted(path.name for path in workdir.iterdir()) == [
      '.lock', 'checkpoints', 'metrics.jsonl', 'summary.json', 'weights.safetensors',
      'weights_best.safetensors']
  assert set(summary['files']) == {
      'checkpoints/', 'metrics.jsonl', 'summary.json', 'weights.safetensors',
      'weights_best.safetensors'}
  assert (summary['network'], summary['synthetic'],
          summary['command']) == ('teacher', False, 'python main.py')
  assert summary['teacher'] is None  # It follows none.
  assert summary['parameters']['student'] == build.fresh_network(resolve(
      teacher_config()).teacher, jax.random.key(0)).num_params()
  assert json.loads((workdir / 'summary.json').read_text())['student']['last']['round'] == 6
  assert report.PRIVACY not in report.format_summary(summary)


def test_the_network_learns(teacher):
  workdir, summary = teacher
  lines = toy_runs.metrics(workdir)
  assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert lines[-1]['loss'] < 0.8 * lines[0]['loss']
  assert lines[-1]['train_top1'] > 0.5
  assert summary['student']['last']['top1'] > 0.5  # Of five classes.


def test_weights_make_a_teacher(teacher):
  workdir, summary = teacher
  config = teacher_config(teacher__source=str(workdir / 'weights.safetensors'))
  test = data.load('grey', 'test', toy_runs.data_dir())
  found = evaluate.evaluate(build.trained_network(resolve(config).teacher), test,
                            task=resolve(config).task, batch_size=9)
  assert {**found, 'round': 6} == pytest.approx(summary['student']['last'])


def test_a_stopped_run_goes_on_bit_for_bit(teacher, tmp_path, monkeypatch):
  done = []

  def update(self, **numbers):
    done.append(numbers)
    if len(done) == 5:
      raise KeyboardInterrupt

  monkeypatch.setattr(report.Progress, 'update', update)
  with pytest.raises(KeyboardInterrupt):
    train.run(teacher_config(), tmp_path)
  summary = train.run(teacher_config(), tmp_path)
  assert len(done) == 7
  assert summary['student'] == teacher[1]['student']
  assert toy_runs.metrics(tmp_path) == toy_runs.metrics(teacher[0])
  assert (tmp_path / 'weights.safetensors').read_bytes() == (
      teacher[0] / 'weights.safetensors').read_bytes()
  monkeypatch.setattr(train.supervised._Training, 'compile', None)
  assert train.run(teacher_config(), tmp_path)['student'] == summary['student']


def test_a_student_follows_a_teacher_on_real_data(teacher, tmp_path):
  """With no part of the labels: the teacher says all."""
  workdir, summary_of_teacher = teacher
  config = toy_runs.config(**NEW | dict(
      teacher__source=str(workdir / 'weights.safetensors'), train__label_factor=0.0,
      train__teacher_factor=1.0, train__temperature=2.0, train__network='student', train__epochs=8))
  summary = train.run(config, tmp_path)
  assert summary['network'] == 'student'
  assert summary['teacher']['top1'] == summary_of_teacher['student']['last']['top1']
  assert summary['student']['last']['agreement'] > 0.5
  lines = toy_runs.metrics(tmp_path)
  assert lines[-1]['loss'] < 0.8 * lines[0]['loss']


def test_devices_share_a_batch(tmp_path):
  changes = dict(train__epochs=1, augment__student__name='none', optimizer__momentum=0.0)
  for number in (1, 4):
    config = teacher_config(num_devices=number, **changes)
    del config.augment.student['pad']
    summary = train.run(config, tmp_path / str(number))
    assert summary['device']['count'] == number
  for name, one in weights_in(tmp_path / '1').items():
    np.testing.assert_allclose(one, weights_in(tmp_path / '4')[name], rtol=1e-3, atol=1e-4,
                               err_msg=name)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(train__batch_size=62), r'train\.batch_size is 62, must be at most 61'),
    (dict(train__batch_size=6, num_devices=4),
     r'train\.batch_size is 6, must be a positive multiple of 4'),
    (dict(train__network='pupil'), r"train\.network is 'pupil', must be one of teacher, student"),
    (dict(train__epochs=0), r'train\.epochs is 0'),
    (dict(train__label_smoothing=1.0),
     r'train\.label_smoothing is 1\.0, must be a number in \[0, 1\)'),
    (dict(train__teacher_factor=1.0, teacher__source='nowhere.pth'),
     r"teacher\.source is 'nowhere\.pth'"),
    (dict(dataset__train_split='training'), "no split 'training', only test, train"),
    (dict(optimizer__schedule='cosine'), r"optimizer\.schedule is 'cosine', must be one of"),
    (dict(optimizer__name='adamw'),
     r"optimizer\.name is 'adamw', must be one of .* Did you mean 'adam'")])
def test_bad_input_costs_a_line_and_writes_nothing(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message) as error:
    train.run(teacher_config(**changes), tmp_path / 'run')
  assert len(str(error.value).splitlines()) == 1
  assert not (tmp_path / 'run').exists()
