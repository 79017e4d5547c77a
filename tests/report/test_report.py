import io
import json
import math
import os
import re
import stat
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_jax import report
from dfkd_jax.report import files
from dfkd_jax.report import progress as report_progress


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_ledger_counts_by_part():
  clock = Clock()
  ledger = report.Ledger(clock)
  clock.now += 50  # In no part.
  for seconds in (2, 3):
    with ledger.part('synthesis'):
      clock.now += seconds
  ledger.add('student', 7)
  assert ledger.seconds() == dict.fromkeys(report.PARTS, 0) | {'synthesis': 5, 'student': 7}


def test_ledger_counts_a_part_inside_another_once():
  clock = Clock()
  ledger = report.Ledger(clock)
  with ledger.part('student'):
    clock.now += 1
    with ledger.part('compile'):
      clock.now += 10
    clock.now += 100
    assert ledger.seconds()['student'] == 101
    clock.now += 1000
  seconds = {name: value for name, value in ledger.seconds().items() if value}
  assert seconds == {'student': 1101, 'compile': 10}


def test_ledger_counts_what_was_spent_before_an_error():
  clock = Clock()
  ledger = report.Ledger(clock)

  def fail():
    with ledger.part('checkpoint'):
      clock.now += 4
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    fail()
  clock.now += 9
  assert ledger.seconds()['checkpoint'] == 4


def test_ledger_goes_on_from_its_state():
  first, second = report.Ledger(Clock()), report.Ledger(Clock())
  first.add('setup', 1.5)
  second.add('setup', 2)
  second.load(json.loads(json.dumps(first.state())))
  second.add('evaluation', 3)
  assert second.seconds() == dict.fromkeys(report.PARTS, 0) | {'setup': 3.5, 'evaluation': 3}


def test_ledger_names_its_parts():
  ledger = report.Ledger()
  with pytest.raises(ValueError, match=r"'sinthesis'. Did you mean 'synthesis'\? Known: setup, "):
    ledger.add('sinthesis', 1)
  with pytest.raises(ValueError, match='Unknown part'), ledger.part('x'):
    pass


def test_metrics_are_lines_of_json(tmp_path):
  with report.MetricsWriter(tmp_path / 'run') as metrics:
    metrics.write(0, loss=np.float32(0.1), count=np.int64(3), done=True, half=jnp.bfloat16(1.5),
                  missing=None)
    assert lines(tmp_path / 'run') == [
      {'step': 0, 'loss': 0.1, 'count': 3, 'done': True, 'half': 1.5, 'missing': None}
    ]  # Before it is closed.
    metrics.write(np.int32(7), a=float('nan'), b=jnp.float32(-jnp.inf), c=0.1 + 0.2)
  assert lines(tmp_path / 'run')[1] == {'step': 7, 'a': None, 'b': None, 'c': 0.1 + 0.2}


@pytest.mark.parametrize('value', ['high', np.zeros(2), [1.0], {'a': 1}, 1 + 2j, object()])
def test_metrics_are_numbers(tmp_path, value):
  with report.MetricsWriter(tmp_path) as metrics:
    with pytest.raises(ValueError, match="'accuracy' is "):
      metrics.write(1, accuracy=value)
    metrics.write(2, accuracy=1)
  assert lines(tmp_path) == [{'step': 2, 'accuracy': 1}]


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=50, deadline=None)
def test_no_bit_of_a_number_is_lost(tmp_path_factory, value):
  folder = tmp_path_factory.mktemp('metrics')
  with report.MetricsWriter(folder) as metrics:
    metrics.write(0, single=np.float32(value), double=value / 3)
  (line,) = lines(folder)
  assert np.float32(line['single']) == np.float32(value)
  assert line['double'] == value / 3


@given(
  steps=st.lists(st.integers(0, 12), max_size=15),
  last=st.integers(-1, 12),
  cut=st.integers(0, 30),
)
@settings(max_examples=60, deadline=None)
def test_a_resumed_run_has_each_step_as_if_never_stopped(tmp_path_factory, steps, last, cut):
  folder = tmp_path_factory.mktemp('metrics')
  with report.MetricsWriter(folder) as metrics:
    for number, step in enumerate(steps):
      metrics.write(step, number=number)
  path = folder / 'metrics.jsonl'
  content = path.read_bytes()
  path.write_bytes(content[: len(content) - cut] if cut < len(content) else b'')
  complete = path.read_bytes().count(b'\n')
  expected = [{'step': s, 'number': n} for n, s in enumerate(steps) if s <= last and n < complete]
  with report.MetricsWriter(folder, resume_step=last) as metrics:
    metrics.write(last + 1, number=-1)
  assert lines(folder) == [*expected, {'step': last + 1, 'number': -1}]
  assert os.listdir(folder) == ['metrics.jsonl']


def test_metrics_keep_all_unless_told_but_repair_a_cut_line(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(
      '{"step": 3, "a": 1}\nnoise\n[1]\n{"step": 4}\n{"step": 5, "a"')
  with report.MetricsWriter(tmp_path) as metrics:
    metrics.write(1)
  assert [line['step'] for line in lines(tmp_path)] == [3, 4, 1]


def test_metrics_without_damage_are_not_written_again(tmp_path, monkeypatch):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 3}\n{"step": 4}\n')
  monkeypatch.setattr(os, 'replace', None)
  with report.MetricsWriter(tmp_path, resume_step=4) as metrics:
    metrics.write(5)
  assert [line['step'] for line in lines(tmp_path)] == [3, 4, 5]


def test_the_folder_of_a_new_file_is_synced_after_the_rename(tmp_path, monkeypatch):
  synced, fsync = [], os.fsync

  def record(descriptor):
    synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), os.listdir(tmp_path)))
    fsync(descriptor)

  monkeypatch.setattr(os, 'fsync', record)
  with files.replace_file(tmp_path / 'a') as file:
    file.write(b'1')
  assert [is_folder for is_folder, _ in synced] == [False, True]
  assert synced[1][1] == ['a']


def test_an_unwritable_workdir_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  for write in (
    lambda: report.MetricsWriter(tmp_path / 'file'),
    lambda: report.write_summary(tmp_path / 'file' / 'run', {}),
    lambda: report.image_grid(tmp_path / 'missing' / 'a.png', np.zeros((1, 2, 3, 1)), ['a']),
  ):
    with pytest.raises(ValueError, match=r'^Cannot write [^\n]*: [^\n]*\.$'):
      write()


SUMMARY = {
  'versions': {'jax': '1'},
  'config': {'betas': (0.5, np.float32(0.9)), 'rate': math.inf},
  'student': {
    'last': {'top1': 0.8529, 'top5': 0.99, 'cross_entropy': 0.4567, 'agreement': 0.8601,
             'round': 200},
    'best': {'top1': jnp.float32(0.8602), 'top5': 0.993, 'cross_entropy': 0.4412,
             'agreement': 0.869, 'round': 187},
  },
  'teacher': {'top1': 0.9268, 'top5': 0.9987, 'cross_entropy': 0.2211},
  'control': {'top1': 0.4102, 'top5': 0.8, 'cross_entropy': 2.1, 'agreement': 0.43},
  'parameters': {'student': 78042, 'teacher': 313002},
  'seconds': {'setup': 5.0, 'student': 100.0, 'synthesis': 80.0, 'checkpoint': 0.0},
  'wall_seconds': 200.0,
  'seed': 0,
  'workdir': 'runs/a',
  'files': ['summary.json', 'images.png'],
}


def test_summary_holds_everything_results_first(tmp_path):
  report.write_summary(tmp_path, SUMMARY)
  content = json.loads((tmp_path / 'summary.json').read_text())
  assert list(content)[:4] == ['student', 'teacher', 'control', 'parameters']
  assert set(content) == set(SUMMARY)
  assert content['config'] == {'betas': [0.5, 0.9], 'rate': None}
  assert content['student']['best']['top1'] == 0.8602


def test_summary_is_replaced_whole_or_not_at_all(tmp_path):
  report.write_summary(tmp_path, {'seed': 1})
  with pytest.raises(ValueError, match=r"'config\.model' is <object"):
    report.write_summary(tmp_path, {'seed': 2, 'config': {'model': object()}})
  assert json.loads((tmp_path / 'summary.json').read_text()) == {'seed': 1}
  report.write_summary(tmp_path, {'seed': 3})
  assert json.loads((tmp_path / 'summary.json').read_text()) == {'seed': 3}
  assert os.listdir(tmp_path) == ['summary.json']


def test_a_failed_replacement_leaves_the_old_file_alone(tmp_path, monkeypatch):
  report.write_summary(tmp_path, {'seed': 1})

  def fail(*paths):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(ValueError, match=r'Cannot write .*summary\.json: No space left on device\.'):
    report.write_summary(tmp_path, {'seed': 2})
  assert json.loads((tmp_path / 'summary.json').read_text()) == {'seed': 1}
  assert os.listdir(tmp_path) == ['summary.json']


def test_closing_lines_say_all_results():
  text = report.format_summary(SUMMARY)
  rows = {row[:21].strip(): row[21:].split() for row in text.splitlines()}
  assert rows['teacher'] == ['92.68%', '99.87%', '0.2211']
  assert rows['student, last'] == ['85.29%', '99.00%', '86.01%', '0.4567', 'round', '200']
  assert rows['student, best'][:6] == ['86.02%', '99.30%', '86.90%', '0.4412', 'round', '187;']
  assert rows['student, best'][-3:] == ['the', 'test', 'set']
  assert rows['control'][:4] == ['41.02%', '80.00%', '43.00%', '2.1000']
  # 0.8529 / 0.9268 and 0.8602 / 0.9268.
  assert rows['student / teacher'] == ['0.920', 'last,', '0.928', 'best']
  assert rows['parameters'] == ['student', '78,042,', 'teacher', '313,002,', 'ratio', '0.249']
  times = re.findall(r'([\d.]+) s +(\d+)%  (\w+)', text)
  assert times[:2] == [('100.0', '50', 'student'), ('80.0', '40', 'synthesis')]
  assert times[2:] == [('15.0', '8', 'other'), ('5.0', '2', 'setup')]
  assert '200.0 s in all' in text
  assert 'summary.json, images.png in runs/a' in text
  assert text.endswith(report.PRIVACY)
  assert '\n' not in report.PRIVACY


def test_closing_lines_name_a_prior_from_outside():
  text = report.format_summary(SUMMARY | {'external_prior': 'words.npy'})
  assert re.search('external prior +words.npy', text)
  assert 'external' not in report.format_summary(SUMMARY | {'external_prior': None})


def test_closing_lines_leave_out_what_is_not_there():
  result = {'last': {'top1': 0.5, 'agreement': None}, 'best': None}
  text = report.format_summary(
      {'student': result, 'control': None, 'teacher': {'top1': 0.0}, 'synthetic': False})
  assert '50.00%' in text
  for word in ('control', 'best', 'student / teacher', 'parameters', 'time', report.PRIVACY, 'None',
               'round'):
    assert word not in text


def test_closing_lines_have_agreement_and_judged_images_and_rates():
  held_out = {'held_out_agreement': 0.75, 'round': 9}
  text = report.format_summary({
      'student': {'last': held_out, 'best': held_out | {'held_out_agreement': 0.8, 'round': 7}},
      'images': {'judge_top1': 0.5, 'judge_top5': 0.9, 'count': 1000.0},
      'rates': {'synthesis_image_steps': 1234.4, 'student_images': 567.8}})
  assert 'no real test images' in text
  assert re.search('synthetic images .* 75.00% last, best 80.00% at round 7', text)
  assert re.search(r'50.00% \(top-1\) and 90.00% \(top-5\) of 1000', text)
  assert re.search('1,234 image-steps/s .* 568 images/s', text)


def test_closing_lines_have_the_iou_of_each_class_by_name():
  student, teacher = {'iou_0': 0.25, 'iou_10': 0.125}, {'iou_0': 0.5, 'iou_1': 0.75}
  text = report.format_summary({
      'student': {'last': student | {'mean_iou': 0.1}, 'best': None},
      'teacher': teacher | {'mean_iou': 0.4}, 'columns': [('mean_iou', 'mIoU', '.4f')],
      'class_names': ['sky', 'road']})
  assert re.search(r'IoU by class +student +teacher\n'
                   r'sky +0\.250 +0\.500\nroad +- +0\.750\n10 +0\.125 +-\n', text)
  assert 'IoU' not in report.format_summary(SUMMARY)


def whole_summary():
  more = {'config': {'seed': 1}, 'weights': {'judge': None}, 'changed': [], 'network': None}
  return json.loads(json.dumps(SUMMARY | more, default=float).replace('Infinity', 'null'))


def test_a_whole_summary_passes_the_check(tmp_path):
  report.check_summary(whole_summary())
  report.check_summary(whole_summary() | {'control': None, 'further': [1]})
  report.write_summary(tmp_path, whole_summary())
  report.check_summary(json.loads((tmp_path / 'summary.json').read_text()))


@pytest.mark.parametrize(('field', 'value', 'message'), [
    ('student', None, 'summary.student must be dict, got None'),
    ('student', {}, 'summary.student.last is missing'),
    ('weights', [], r'summary.weights must be dict, got \[\]'),
    ('changed', None, 'summary.changed must be list, got None'),
    ('config', 3, 'summary.config must be dict, got 3'),
])
def test_the_check_of_a_summary_names_the_field(field, value, message):
  with pytest.raises(ValueError, match=rf'\A(?!.*\n){message}'):
    report.check_summary(whole_summary() | {field: value})


def test_progress_is_quiet_where_nobody_looks():
  stream = io.StringIO()
  with report.Progress(100, initial=50, stream=stream) as progress:
    progress.update(accuracy=0.8765)
    for number in range(49):
      progress.update(loss=jnp.float32(number))
  written = stream.getvalue().splitlines()
  assert '\r' not in stream.getvalue()
  assert [line.split('  ')[0] for line in written] == [
      'round 51/100 started', *(f'round {done}/100' for done in (51, *range(55, 101, 5)))]
  assert '  accuracy 0.876  loss 48  ' in written[-1]


def test_rounds_that_take_long_have_a_line_each(monkeypatch):
  clock, stream = Clock(), io.StringIO()
  monkeypatch.setattr(report_progress, 'time', types.SimpleNamespace(perf_counter=clock))
  with report.Progress(400, stream=stream) as progress:
    for _ in range(8):
      clock.now += 40
      progress.update()
  assert stream.getvalue().splitlines()[1:] == [
      f'round {done}/400  {40 * done} s, {40 * (400 - done)} s left' for done in (1, 3, 5, 7)]


def test_progress_is_a_bar_on_a_terminal():
  stream = Terminal()
  with report.Progress(20, stream=stream, unit='epoch') as progress:
    for _ in range(20):
      progress.update(loss=0.12345)
  assert '20/20' in stream.getvalue()
  assert 'loss=0.123' in stream.getvalue()
  assert 'epochs' in stream.getvalue()


def test_surroundings():
  versions = report.versions()
  assert versions['jax'] == jax.__version__
  assert versions['numpy'] == np.__version__
  assert list(versions) == [
      'python', 'dfkd_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy']
  device = report.device()
  assert (device['platform'], device['count']) == (jax.default_backend(), jax.device_count())
  assert device['cores'] >= 1
  assert device['cpu']
  json.dumps([versions, device])
