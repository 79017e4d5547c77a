"""Runs that were cut off at odd places, were moved, or continue with another config."""

import json
import shutil
import signal

import jax
import pytest
import toy_runs
from toy_runs import stopped

from dfkd_jax import report, train, weights
from dfkd_jax.config import build
from dfkd_jax.config.records import resolve
from dfkd_jax.runs import folder as run_folder
from dfkd_jax.runs import programs
from dfkd_jax.runs.loop import Experiment

CALLS = 4  # Of the control: five rounds, of which the first has no student steps.


@pytest.fixture(autouse=True, scope='module')
def _quick():
  with toy_runs.quick():
    yield


def counted(monkeypatch, at=None, stop=lambda: None):
  """Calls of the control's program, as they come; at that of a number something happens."""
  calls, made, compiled = [], [], programs.compile_steps

  def make(*arguments):
    program = compiled(*arguments)
    made.append(program)
    if len(made) == 1:  # The student's.
      return program

    def run(*given):
      calls.append(1)
      if len(calls) == at:
        stop()
      return program(*given)
    return run

  monkeypatch.setattr(programs, 'compile_steps', make)
  return calls


def interrupt():
  raise KeyboardInterrupt


def test_the_control_goes_on_where_it_was_cut_off(tmp_path):
  wanted = toy_runs.whole(control=True)[0]
  with pytest.MonkeyPatch.context() as patch:
    counted(patch, CALLS, interrupt)
    with pytest.raises(KeyboardInterrupt):
      train.run(toy_runs.config(control=True), tmp_path)
  assert (tmp_path / 'control').is_dir()
  with pytest.MonkeyPatch.context() as patch:
    calls = counted(patch)
    summary = train.run(toy_runs.config(control=True), tmp_path)
  assert len(calls) == CALLS - 2  # Saved every second round.
  for name in ('control', 'student', 'images'):
    assert summary[name] == wanted[name]
  assert summary['counts'] == wanted['counts'] | {'starts': 2}
  assert not (tmp_path / 'control').exists()


def test_a_signal_ends_the_control_after_its_call(tmp_path, heeded, capsys):
  with pytest.MonkeyPatch.context() as patch:
    counted(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    found = train.run(toy_runs.config(control=True), tmp_path, signals=True)
  assert (found['stopped'], found['done'], found['total']) == ('SIGTERM', 5, 5)
  text = f'after round 5 of 5 and call 3 of {CALLS} of the control, saved in'
  assert text in capsys.readouterr().err
  with pytest.MonkeyPatch.context() as patch:
    calls = counted(patch)
    summary = train.run(toy_runs.config(control=True), tmp_path)
  assert len(calls) == CALLS - 3
  assert summary['control'] == toy_runs.whole(control=True)[0]['control']
  assert summary['seconds']['control'] > found['seconds']['control'] > 0
  assert summary['wall_seconds'] > found['wall_seconds']


@pytest.mark.exhaustive
def test_time_may_run_out_in_the_control_too(tmp_path):
  # Two calls of the control.
  config = toy_runs.config(control=True, distill__rounds=3, budget__minutes=1e-9)
  for done in (1, 2, 3):
    found = train.run(config, tmp_path)
    assert (found['stopped'], found['done']) == ('budget.minutes', done)
  assert (tmp_path / 'control' / '1').is_dir()  # The third start did the last round, and a call.
  assert train.run(config, tmp_path)['control'] is not None


@pytest.mark.exhaustive
def test_a_control_of_another_run_is_not_gone_on_with(tmp_path):
  with pytest.MonkeyPatch.context() as patch:
    counted(patch, CALLS, interrupt)
    with pytest.raises(KeyboardInterrupt):
      train.run(toy_runs.config(control=True), tmp_path)
  other = toy_runs.config(control=True, distill__temperature=3.0)
  with pytest.MonkeyPatch.context() as patch:
    calls = counted(patch)
    train.run(other, tmp_path, resume='force:distill.temperature')
  assert len(calls) == CALLS


def cut_off_in_the_control(workdir):
  with pytest.MonkeyPatch.context() as patch:
    counted(patch, CALLS, interrupt)
    with pytest.raises(KeyboardInterrupt):
      train.run(toy_runs.config(control=True), workdir)


@pytest.mark.exhaustive
def test_a_control_that_cannot_be_read_is_begun_anew(tmp_path, capsys):
  cut_off_in_the_control(tmp_path)
  for path in (tmp_path / 'control').rglob('manifest.ocdbt'):
    path.write_bytes(b'')
  with pytest.MonkeyPatch.context() as patch:
    calls = counted(patch)
    summary = train.run(toy_runs.config(control=True), tmp_path)
  assert len(calls) == CALLS
  assert 'The control starts anew.' in capsys.readouterr().err
  assert summary['control'] == toy_runs.whole(control=True)[0]['control']


@pytest.mark.exhaustive
def test_a_control_goes_on_though_the_teacher_lies_elsewhere(tmp_path):
  cut_off_in_the_control(tmp_path / 'run')
  moved = shutil.copy(toy_runs.teacher_file(), tmp_path / 'moved.safetensors')
  with pytest.MonkeyPatch.context() as patch:
    calls = counted(patch)
    train.run(toy_runs.config(control=True, teacher__source=str(moved)), tmp_path / 'run')
  assert len(calls) == CALLS - 2


@pytest.mark.exhaustive
def test_a_run_that_may_be_reseeded_starts_again_from_its_first_checkpoint(tmp_path):
  config = toy_runs.config(faults__reseed=1)
  stopped(config, tmp_path, 1)
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['0']
  assert train.run(config, tmp_path)['student'] == toy_runs.whole()[0]['student']
  assert toy_runs.metrics(tmp_path) == toy_runs.whole()[1]


@pytest.mark.parametrize('before', [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_the_best_student_may_be_kept_from_now_on_or_no_longer(tmp_path, before):
  stopped(toy_runs.config(checkpoint__keep_best=before), tmp_path, 3)
  other = toy_runs.config(checkpoint__keep_best=not before)
  summary = train.run(other, tmp_path, resume='force:checkpoint.keep_best')
  assert summary['student'] == toy_runs.whole()[0]['student']
  better = summary['student']['best']['round'] > 2
  assert ('student_best.safetensors' in summary['files']) == (not before and better)


def test_fewer_rounds_than_are_done_are_refused(tmp_path):
  train.run(toy_runs.config(), tmp_path)
  before = toy_runs.tree_of(tmp_path)
  with pytest.raises(ValueError, match=r'holds 5 rounds, more than the requested 3'):
    train.run(toy_runs.config(distill__rounds=3), tmp_path, resume='force')
  assert toy_runs.tree_of(tmp_path) == before


def test_an_ended_run_without_checkpoints_is_not_begun_anew(tmp_path):
  train.run(toy_runs.config(), tmp_path)
  shutil.rmtree(tmp_path / 'checkpoints')
  before = toy_runs.tree_of(tmp_path)
  with pytest.raises(ValueError, match='has ended, and no checkpoint to continue from'):
    train.run(toy_runs.config(distill__rounds=7), tmp_path, resume='force:distill.rounds')
  other = toy_runs.folder() / 'other.safetensors'
  variables = weights.load(
      toy_runs.teacher_file(), build.module(resolve(toy_runs.config()).teacher), toy_runs.IMAGE)
  weights.save_safetensors(other, jax.tree.map(lambda leaf: leaf * 1.5, variables))
  with pytest.raises(ValueError, match='has ended, and no checkpoint to continue from'):
    train.run(toy_runs.config(teacher__source=str(other)), tmp_path, resume='force:teacher.source')
  assert toy_runs.tree_of(tmp_path) == before
  # It is told again.
  assert train.run(toy_runs.config(), tmp_path)['student'] == toy_runs.whole()[0]['student']


@pytest.mark.exhaustive
def test_all_that_was_forced_is_on_record_whatever_checkpoint_is_left(tmp_path):
  stopped(toy_runs.config(checkpoint__max_to_keep=9), tmp_path, 3)
  other = toy_runs.config(checkpoint__max_to_keep=9, distill__temperature=3.0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Experiment, 'write_summary', lambda *arguments, **more: interrupt())
    with pytest.raises(KeyboardInterrupt):
      train.run(other, tmp_path, resume='force')
  (tmp_path / 'checkpoints' / '5' / 'state' / 'manifest.ocdbt').write_bytes(b'')
  shutil.rmtree(tmp_path / 'checkpoints' / '4')
  summary = train.run(other, tmp_path, resume='force')
  record, = summary['changed']
  assert record == {'after': 2, 'fields': {'distill.temperature': {'there': 4.0, 'here': 3.0}}}


@pytest.mark.exhaustive
def test_two_changes_of_an_ended_run_are_both_on_record(tmp_path):
  train.run(toy_runs.config(), tmp_path)
  train.run(toy_runs.config(grid__rows=2), tmp_path, resume='force:grid')
  summary = train.run(toy_runs.config(grid__rows=2, grid__columns=2), tmp_path, resume='force:grid')
  record, = summary['changed']
  assert set(record['fields']) == {'grid.rows', 'grid.columns'}
  first, second = (json.loads((tmp_path / f'summary_after_5{end}.json').read_text())
      for end in ('', '_2'))
  assert (first['changed'], set(second['changed'][0]['fields'])) == ([], {'grid.rows'})


@pytest.mark.exhaustive
def test_other_weights_that_were_forced_are_on_record(tmp_path):
  stopped(toy_runs.config(), tmp_path / 'run', 3)
  other = tmp_path / 'teacher.safetensors'
  variables = weights.load(
      toy_runs.teacher_file(), build.module(resolve(toy_runs.config()).teacher), toy_runs.IMAGE)
  weights.save_safetensors(other, jax.tree.map(lambda leaf: leaf * 1.5, variables))
  config = toy_runs.config(teacher__source=str(other))
  with pytest.raises(ValueError, match=r'weights\.teacher is .*--resume=force:teacher\.source'):
    train.run(config, tmp_path / 'run')
  summary = train.run(config, tmp_path / 'run', resume='force:teacher.source')
  assert set(summary['changed'][0]['fields']) == {'weights.teacher'}
  # Though it has ended.
  again = train.run(toy_runs.config(), tmp_path / 'run', resume='force:teacher.source')
  assert again['weights']['teacher'] != summary['weights']['teacher']
  assert (tmp_path / 'run' / 'summary_after_5.json').exists()


def test_weights_may_lie_elsewhere(tmp_path):
  stopped(toy_runs.config(), tmp_path / 'run', 3)
  moved = shutil.copy(toy_runs.teacher_file(), tmp_path / 'moved.safetensors')
  summary = train.run(toy_runs.config(teacher__source=str(moved)), tmp_path / 'run')
  assert summary['student'] == toy_runs.whole()[0]['student']
  assert summary['changed'] == []


@pytest.mark.parametrize('gone', [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_what_a_run_began_with_may_be_gone_or_go_on(tmp_path, gone):
  train.run(toy_runs.config(), tmp_path / 'old')
  begun = dict(init_from__student=str(tmp_path / 'old'), init_from__generator=str(tmp_path / 'old'))
  wanted = train.run(toy_runs.config(**begun), tmp_path / 'undisturbed')
  stopped(toy_runs.config(**begun), tmp_path / 'run', 3)
  if gone:
    shutil.rmtree(tmp_path / 'old')
  else:
    train.run(toy_runs.config(distill__rounds=7), tmp_path / 'old', resume='force:distill.rounds')
  summary = train.run(toy_runs.config(**begun), tmp_path / 'run')
  assert summary['student'] == wanted['student']
  assert summary['weights'] == wanted['weights']


def test_the_control_needs_what_the_student_began_with(tmp_path):
  train.run(toy_runs.config(), tmp_path / 'old')
  begun = dict(init_from__student=str(tmp_path / 'old'), control=True)
  stopped(toy_runs.config(**begun), tmp_path / 'run', 3)
  shutil.rmtree(tmp_path / 'old')
  with pytest.raises(ValueError, match=r"init_from\.student is '.*old'"):
    train.run(toy_runs.config(**begun), tmp_path / 'run')


def test_a_run_that_came_between_is_noticed_under_the_lock(tmp_path, monkeypatch):
  """Another starts, runs and ends while this one compiles."""
  other, placed = toy_runs.config(seed=9), programs.place_and_compile

  def meanwhile(*arguments, **more):
    monkeypatch.setattr(programs, 'place_and_compile', placed)
    stopped(other, tmp_path, 3)
    return placed(*arguments, **more)

  monkeypatch.setattr(programs, 'place_and_compile', meanwhile)
  with pytest.raises(ValueError, match=r'Another process has run in .* since this one began'):
    train.run(toy_runs.config(), tmp_path)
  assert train.run(other, tmp_path)['seed'] == 9


def test_a_run_that_is_under_way_is_noticed_at_once(tmp_path):
  with run_folder.lock(tmp_path), pytest.raises(
      ValueError, match=f'Another process is running in {tmp_path}'):
    train.run(toy_runs.config(labels='odd'), tmp_path)


def test_what_was_cut_off_is_removed(tmp_path):
  for name in ('summary.json.7.tmp', 'student.safetensors.7.tmp', 'images.png.7.tmp',
      'metrics.jsonl.7.tmp'):
    (tmp_path / name).write_bytes(b'half')
  (tmp_path / 'notes.tmp').write_bytes(b'mine')
  with run_folder.lock(tmp_path):
    pass
  assert sorted(path.name for path in tmp_path.iterdir()) == ['.lock', 'notes.tmp']


def test_metrics_of_a_run_that_saved_nothing_are_begun_anew_aloud(tmp_path, capsys):
  stopped(toy_runs.config(), tmp_path, 1)
  train.run(toy_runs.config(seed=3), tmp_path)
  text = f'A run in {tmp_path} had saved nothing; its metrics.jsonl starts anew'
  assert text in capsys.readouterr().err


def test_a_line_that_the_disk_refuses_is_not_written_twice(tmp_path, monkeypatch):
  """The first part of it fits, and closing the file raises nothing of its own."""
  class Full:
    written = b''

    def write(self, data):
      if self.written:
        raise OSError(28, 'No space left on device')
      Full.written = data[:5]
      return 5

    def close(self):
      pass

  writer = report.MetricsWriter(tmp_path)
  writer._file.close()
  writer._file = Full()
  with pytest.raises(
      ValueError, match=r'^Cannot write .*metrics.jsonl: No space left on device\.$'), writer:
    writer.write(1, loss=2.0)


@pytest.mark.exhaustive
def test_another_generator_of_random_numbers_is_another_run(tmp_path):
  with jax.default_prng_impl('rbg'):
    stopped(toy_runs.config(), tmp_path, 3)
  before = toy_runs.tree_of(tmp_path)
  with pytest.raises(
      ValueError, match=r"jax\.default_prng_impl is 'rbg' there, 'threefry2x32' here.*"
                     r'--resume=force:jax\.default_prng_impl'):
    train.run(toy_runs.config(), tmp_path)
  assert toy_runs.tree_of(tmp_path) == before
  summary = train.run(toy_runs.config(), tmp_path, resume='force:jax.default_prng_impl')
  record, = summary['changed']
  assert record['fields'] == {'jax.default_prng_impl': {'there': 'rbg', 'here': 'threefry2x32'}}
  assert summary['jax']['default_prng_impl'] == 'threefry2x32'
