"""Rounds with a number that is not finite: a report that reproduces them, and other keys."""

import json

import jax
import numpy as np
import pytest
import toy_runs

from dfkd_jax import train
from dfkd_jax.runs import programs


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


def broken(times, index, what='metrics'):
  """Lets round `index` fail `times` times in a term, the student's loss, or a parameter."""
  left = [times]

  def make(original):
    def placed(*arguments, **more):
      made, state = original(*arguments, **more)

      def synthesize(synthesis, key, teacher, student):
        step = int(synthesis.step)
        synthesis, metrics = made.synthesize(synthesis, key, teacher, student)
        if what == 'metrics' and step == index and left[0]:
          left[0] -= 1
          metrics['one_hot'] = metrics['one_hot'].at[1].set(np.nan)
          metrics['loss'] = metrics['loss'].at[1].set(np.nan)
        return synthesis, metrics

      def distil(student, synthesis, key, teacher):
        step = int(synthesis.step)
        student, synthesis, metrics = made.distill(student, synthesis, key, teacher)
        if step == index + 1 and left[0] and what != 'metrics':
          left[0] -= 1
          if what == 'losses':
            metrics['losses'] = metrics['losses'].at[2].set(np.inf)
          else:
            params = jax.tree.map(lambda leaf: leaf * np.inf, student.network.params)
            student = student.replace(network=student.network.replace(params=params))
        return student, synthesis, metrics

      return made._replace(synthesize=synthesize, distill=distil), state
    return placed

  return make(programs.place_and_compile)


FAULTS = {
    'metrics': ("'one_hot' of the synthesis is nan at step 1 of call 0", 1, 'one_hot'),
    'losses': ("'loss' of the student is inf at step 2 of call 0", 2, 'loss'),
    'params': ("'0/network/params/.*' of the state is not finite", None, None)}


@pytest.mark.parametrize('what', FAULTS)
def test_a_number_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, what):
  message, step, name = FAULTS[what]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(programs, 'place_and_compile', broken(1, 3, what))
    with pytest.raises(ValueError,
        match=f'In round 4: {message}. The checkpoint of round 2 is kept; .*fault.json'):
      train.run(toy_runs.config(), tmp_path, command='python main.py')
  found = json.loads((tmp_path / 'fault.json').read_text())
  assert (found['round'], found['checkpoint'], found['step'], found['call']) == (
      4, 2, step, None if step is None else 0)
  assert name in (None, found['name'])
  key = jax.random.fold_in(jax.random.split(jax.random.key(0), 5)[2], 3)
  assert found['key'] == jax.random.key_data(key).tolist()
  assert [line['step'] for line in toy_runs.metrics(tmp_path)] == [1, 2, 3]
  # The fault was not of the numbers: it does not come again.
  summary = train.run(toy_runs.config(), tmp_path)
  assert summary['student'] == toy_runs.whole()[0]['student']
  assert toy_runs.metrics(tmp_path) == toy_runs.whole()[1]


@pytest.mark.parametrize('index', [1, 3])
def test_a_round_may_be_done_again_with_other_keys(tmp_path, monkeypatch, capsys, index):
  """From the checkpoint before, or from the start where there is none; twice."""
  monkeypatch.setattr(programs, 'place_and_compile', broken(2, index))
  summary = train.run(toy_runs.config(faults__reseed=2), tmp_path)
  assert summary['counts']['reseeded'] == 2
  text = f'Repeating it with other keys from round {2 if index == 3 else 0} on.'
  assert text in capsys.readouterr().err
  lines = toy_runs.metrics(tmp_path)
  assert [line['step'] for line in lines] == [1, 2, 3, 4, 5]
  assert lines[:index] == toy_runs.whole()[1][:index]
  assert lines[index] != toy_runs.whole()[1][index]


def test_faults_in_training_are_named_too(tmp_path):
  config = toy_runs.config(job='train', train__epochs=2, optimizer__learning_rate=1e30)
  with pytest.raises(
      ValueError, match=r"In epoch 1: 'loss' of the student is \w+ at step \d .*No checkpoint was"):
    train.run(config, tmp_path)


def test_fault_reports_of_rounds_done_again_are_named_among_the_files(tmp_path, monkeypatch):
  monkeypatch.setattr(programs, 'place_and_compile', broken(1, 3))
  summary = train.run(toy_runs.config(faults__reseed=2), tmp_path)
  assert summary['files'][-1] == 'fault_4_1.json'
  assert not (tmp_path / 'fault.json').exists()
  about = json.loads((tmp_path / 'fault_4_1.json').read_text())
  assert (about['round'], about['reseeded'], about['checkpoint'], len(about['key'])) == (4, 0, 2, 2)
