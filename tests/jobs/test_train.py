import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
import toy_runs
import toys
from PIL import Image
from toy_runs import equal, four_tasks

from configs import default
from dfkd_jax import data, evaluate, models, report, train, weights
from dfkd_jax.config import build
from dfkd_jax.config.records import resolve
from dfkd_jax.runs import programs
from dfkd_jax.runs.checkpoint import Checkpoints
from dfkd_jax.runs.loop import Experiment, Start
from dfkd_jax.synth import methods


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


WHOLE = dict(control=True, preflight__enabled=True)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run without a stop: workdir, summary, state, programs compiled by round."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  return workdir, *toy_runs.observed(
      toy_runs.config(**WHOLE), workdir)


def test_a_run_leaves_its_files_and_says_so(whole):
  workdir, summary, *_ = whole
  assert sorted(path.name for path in workdir.iterdir()) == [
      '.lock', 'checkpoints', 'images.png', 'metrics.jsonl', 'student.safetensors',
      'student_best.safetensors', 'summary.json']
  assert json.loads((workdir / 'summary.json').read_text()) == json.loads(json.dumps(summary))
  assert set(summary['files']) == {
      'checkpoints/', 'images.png', 'metrics.jsonl', 'student.safetensors',
      'student_best.safetensors', 'summary.json'}
  with Image.open(workdir / 'images.png') as image:
    assert image.size[0] > 10 * toy_runs.IMAGE[1]


def test_summary_says_what_was_found_and_how(whole):
  workdir, summary, state, _ = whole
  assert set(summary['student']['last']) == {'top1', 'top5', 'cross_entropy', 'agreement', 'count',
                                             'round'}
  assert summary['student']['last']['round'] == 5
  assert summary['student']['best']['top1'] >= summary['student']['last']['top1']
  assert 'agreement' not in summary['teacher']
  assert 0 <= summary['control']['agreement'] <= 1
  assert 'test images' in summary['note']
  student, teacher = state.student.network, build.trained_network(
      resolve(toy_runs.config()).teacher)
  assert summary['parameters'] == {'student': student.num_params(), 'teacher': teacher.num_params()}
  assert summary['parameters']['student'] == 2 * 9 + 2 * 2 + 2 * 3 * 9 + 2 * 3 + 3 * 5 + 5
  assert list(summary['seconds']) == list(report.PARTS)
  assert all(summary['seconds'][part] > 0 for part in report.PARTS if part != 'head')
  assert sum(summary['seconds'].values()) <= summary['wall_seconds']
  assert (summary['seed'], summary['command'],
          summary['workdir']) == (0, 'python main.py', str(workdir))
  assert summary['device']['count'] == 1  # Used, of the four at hand.
  assert summary['versions']['jax'] == jax.__version__
  assert summary['config']['distill']['rounds'] == 5


def test_results_are_those_of_the_networks(whole):
  _, summary, state, _ = whole
  config = toy_runs.config()
  test, task, teacher = data.load('toy', 'test',
                                  toy_runs.data_dir()), resolve(config).task, build.trained_network(
                                      resolve(config).teacher)
  wanted = evaluate.evaluate(state.student.network, test, task=task, batch_size=23, teacher=teacher)
  assert {**wanted, 'round': 5} == pytest.approx(summary['student']['last'])
  assert evaluate.evaluate(teacher, test, task=task) == pytest.approx(summary['teacher'])


def test_metrics_have_a_line_for_each_round(whole):
  lines = toy_runs.metrics(whole[0])
  assert [line['step'] for line in lines] == [1, 2, 3, 4, 5]
  assert 'loss' not in lines[0]
  for line in lines[1:]:
    assert {'loss', 'synthetic_agreement', 'agreement', 'top1', 'synthesis_loss',
            'synthesis_batch_norm', 'synthesis_one_hot', 'synthesis_adversarial'} <= set(line)


def test_weights_of_the_student_load_as_a_network(whole):
  workdir, _, state, _ = whole
  config = toy_runs.config()
  variables = weights.load(workdir / 'student.safetensors', build.module(resolve(config).student),
                           toy_runs.IMAGE)
  network = state.student.network
  assert equal(jax.device_get(variables),
               {'params': network.params, 'batch_stats': network.batch_stats})
  assert json.loads(weights.read_metadata(workdir / 'student.safetensors')['network']) == {
      'model': 'convnet', 'mean': [0.4], 'std': [0.3], 'bgr': False, 'resize': None}


def test_the_student_is_trained_on_what_was_synthesised(whole):
  *_, state, _ = whole
  assert int(state.synthesis.step) == 5
  assert int(state.student.step) == 4 * 3
  assert state.synthesis.buffer.histogram.sum() == 12
  start = build.fresh_network(resolve(toy_runs.config()).student,
                              jax.random.split(jax.random.key(0), 4)[0])
  assert not equal(start.params, state.student.network.params)


def test_each_program_is_compiled_once(whole):
  *_, compiled = whole
  names = [name.removeprefix('jit(').removesuffix(')') for during in compiled for name in during]
  assert names.count('synthesize') == 1
  assert names.count('student_steps') == 2  # The control has its own.
  assert names.count('are_finite') == 1
  assert [during for during in compiled[2:-1] if during] == []  # Nothing after the first round.


def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, capsys):
  workdir, wanted, state, _ = whole
  toy_runs.stopped(toy_runs.config(**WHOLE), tmp_path, 4)
  assert [line['step'] for line in toy_runs.metrics(tmp_path)] == [1, 2, 3, 4]
  assert not (tmp_path / 'summary.json').exists()
  summary, resumed, _ = toy_runs.observed(toy_runs.config(**WHOLE), tmp_path)
  assert 'after round 2' in capsys.readouterr().err
  assert equal(resumed, state)
  assert toy_runs.metrics(tmp_path) == toy_runs.metrics(workdir)
  for name in ('student', 'teacher', 'control', 'parameters', 'config'):
    assert summary[name] == wanted[name]
  assert (tmp_path / 'images.png').read_bytes() == (workdir / 'images.png').read_bytes()
  assert (tmp_path / 'student.safetensors').read_bytes() == (
      workdir / 'student.safetensors').read_bytes()


def test_a_finished_run_is_not_done_again(whole, monkeypatch, capsys):
  workdir, wanted, *_ = whole
  before = toy_runs.tree_of(workdir)
  monkeypatch.setattr(programs, 'compile_programs', None)
  assert train.run(toy_runs.config(**WHOLE), workdir) == json.loads(json.dumps(wanted))
  assert toy_runs.tree_of(workdir) == before
  seen = capsys.readouterr()
  assert 'finished' in seen.err
  assert 'student, last' in seen.out


@pytest.mark.parametrize(('field', 'value', 'there'), [
    ('distill.rounds', 6, '5'), ('seed', 1, '0'), ('factors.one_hot', 0.5, '1.0'),
    ('student.options', {'widths': (4, 3)}, '[2, 3]')])
def test_another_config_in_the_same_folder_is_refused(whole, field, value, there):
  workdir = whole[0]
  before = toy_runs.tree_of(workdir)
  config = toy_runs.config(**WHOLE)
  section, _, name = field.rpartition('.')
  (config[section] if section else config).update({name: value})
  with pytest.raises(ValueError, match='another config') as error:
    train.run(config, workdir)
  assert field in str(error.value)
  assert there in str(error.value)
  assert toy_runs.tree_of(workdir) == before


def test_another_config_is_refused_before_the_run_is_finished(tmp_path):
  toy_runs.stopped(toy_runs.config(), tmp_path, 3)
  before = toy_runs.tree_of(tmp_path)
  with pytest.raises(ValueError, match=r'distill\.temperature is 4\.0 there, 5\.0 here'):
    train.run(toy_runs.config(distill__temperature=5.0), tmp_path)
  assert toy_runs.tree_of(tmp_path) == before


def test_where_things_lie_may_change(whole, tmp_path):
  workdir, wanted, *_ = whole
  elsewhere = tmp_path / 'data'
  elsewhere.symlink_to(toy_runs.data_dir())
  config = toy_runs.config(**WHOLE, dataset__data_dir=str(elsewhere))
  config.compilation_cache = str(tmp_path)
  assert train.run(config, workdir)['student'] == wanted['student']


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
  config = toy_runs.config()
  meta = Experiment(resolve(config), Start(tmp_path), 'round').store.meta
  state = {
      'student': {'network': {'params': {'conv1': {'kernel': np.zeros((5, 5, 1, 2), np.float32)}}}}}
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(3, state, meta | {'done': 3})
  before = toy_runs.tree_of(tmp_path)
  with pytest.raises(ValueError, match='another architecture') as error:
    train.run(config, tmp_path)
  assert len(str(error.value).splitlines()) == 1
  assert toy_runs.tree_of(tmp_path) == before


@pytest.mark.parametrize('changes', [
    {'distill__divergence': 'js'}, {'method__keep': 'first'}, {'method__task_map': 'pmap'},
    {'method__meta': 'maml'}])
def test_nothing_is_written_if_a_program_cannot_be_made(changes, tmp_path):
  config = toy_runs.config()
  config.method.update(keep='best', task_map='auto')
  config.method.meta = 'fomaml'
  config.update_from_flattened_dict({name.replace('__', '.'): value
      for name, value in changes.items()})
  with pytest.raises(ValueError, match=next(iter(changes.values()))) as error:
    train.run(config, tmp_path / 'run')
  assert len(str(error.value).splitlines()) == 1
  assert not (tmp_path / 'run').exists()


def test_a_teacher_without_batch_norm_needs_a_factor_of_zero(tmp_path, monkeypatch):
  from flax import linen as nn

  class Plain(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
      return nn.Dense(self.num_classes)(x.mean((1, 2)))

  monkeypatch.setitem(models._MODELS, 'plain', Plain)
  network = models.create_network(Plain(5), jax.random.key(0), toy_runs.IMAGE)
  weights.save_safetensors(tmp_path / 'plain.safetensors', {'params': network.params})
  config = toy_runs.config(teacher__name='plain',
                           teacher__source=str(tmp_path / 'plain.safetensors'))
  config.teacher.options = {}
  for looked, message in ((True, r'factors\.batch_norm is 10\.0, must be 0'),
                          (False, 'has nothing to match')):
    config.preflight.enabled = looked
    with pytest.raises(ValueError, match=message):
      train.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  config.factors.batch_norm = 0.0
  assert build.trained_network(resolve(config).teacher).running() == {}


def test_devices_share_the_work_of_tasks(tmp_path):
  changes = dict(distill__rounds=1)
  spread, on_four, _ = toy_runs.observed(four_tasks(num_devices=4, **changes), tmp_path / 'four')
  alone, on_one, _ = toy_runs.observed(four_tasks(num_devices=1, **changes), tmp_path / 'one')
  assert (spread['device']['count'], alone['device']['count']) == (4, 1)
  mine, theirs = on_one.synthesis.buffer, on_four.synthesis.buffer
  assert theirs.images.shape == mine.images.shape == (4, 4, *toy_runs.IMAGE)
  assert np.abs(mine.images.astype(int) - theirs.images.astype(int)).max() <= 1  # Rounded down.
  assert equal(mine.histogram, theirs.histogram)
  start = build.fresh_network(resolve(four_tasks()).student,
                              jax.random.split(jax.random.key(0), 4)[0])
  moved = [jax.tree.map(np.subtract, of.student.network.params, start.params)
           for of in (on_four, on_one)]
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 1e-2
  assert max(toys.distances(*moved).values()) <= 1e-4  # Images may differ by a level of uint8.
  for mine, theirs in zip(*(jax.tree.leaves(of.student.network.batch_stats)
                            for of in (on_one, on_four)), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
  assert (tmp_path / 'four' / 'images.png').exists()


@pytest.mark.parametrize('begun', [4, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_several_devices_stop_and_go_on_also_on_one(tmp_path, capsys, begun):
  """On as many bit for bit; on another number, from four to one and back, but for rounding."""
  changes = dict(distill__rounds=3, method__capacity=48, checkpoint__every=1,
                 student__head_init='ridge', student__head_images=30)  # Fitted before round 2.
  _, state, _ = toy_runs.observed(four_tasks(num_devices=begun, **changes), tmp_path / 'whole')
  toy_runs.stopped(four_tasks(num_devices=begun, **changes), tmp_path / 'same', 2)
  shutil.copytree(tmp_path / 'same', tmp_path / 'other')
  found = {}
  for name, num_devices in (('same', begun), ('other', 5 - begun)):
    capsys.readouterr()
    summary, found[name], _ = toy_runs.observed(four_tasks(num_devices=num_devices, **changes),
                                                tmp_path / name)
    assert 'after round 1' in capsys.readouterr().err
    assert summary['device']['count'] == num_devices
    assert [line['step'] for line in toy_runs.metrics(tmp_path / name)] == [1, 2, 3]
  assert equal(found['same'], state)
  assert toy_runs.metrics(tmp_path / 'same') == toy_runs.metrics(tmp_path / 'whole')
  mine, theirs = found['other'].synthesis, state.synthesis
  assert equal(mine.buffer.labels, theirs.buffer.labels)
  assert mine.buffer.labels.shape == (4, 12)
  assert (mine.buffer.images == theirs.buffer.images).mean() > 0.999
  start = build.fresh_network(resolve(four_tasks()).student,
                              jax.random.split(jax.random.key(0), 4)[0]).params
  moved = [jax.tree.map(np.subtract, of.student.network.params, start)
           for of in (found['other'], state)]
  assert max(toys.distances(*moved).values()) <= 1e-3


METHOD = """
import jax
import jax.numpy as jnp

from dfkd_jax.messages import FieldError
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Batch


def uniform(*, image_shape, sample_batch_size, darkest=0.0):
  if darkest >= 1:
    raise FieldError('darkest', f'darkest is {darkest}, must be below 1.')

  def sample(state, key):
    images = jax.random.uniform(key, (sample_batch_size, *image_shape), minval=darkest)
    none = jnp.full(sample_batch_size, -1, jnp.int32)
    return Batch(images, none, none)

  return Synthesizer(
      lambda key, teacher: {'step': jnp.int32(0)},
      lambda state, key, teacher, student: ({'step': state['step'] + 1}, {}), sample)
"""


@pytest.fixture
def uniform(tmp_path, monkeypatch):
  """A config of a method of one's own without generator, factors, labels, tasks or axis."""
  (tmp_path / 'methods').mkdir()
  (tmp_path / 'methods' / 'uniform.py').write_text(METHOD)
  monkeypatch.setattr(methods, '__path__', [*methods.__path__, str(tmp_path / 'methods')])
  config = toy_runs.config(
      distill__rounds=2, distill__distill_after=0, num_devices=None, factors__one_hot=0.0,
      factors__batch_norm=0.0, factors__adversarial=0.0)
  config.method = {'name': 'uniform', 'darkest': 0.25}
  return config


@pytest.mark.parametrize('dataset', ['toy', None])
def test_a_method_of_ones_own_runs_from_end_to_end(uniform, dataset, tmp_path):
  uniform.dataset.name = dataset
  summary = train.run(uniform, tmp_path / 'run')
  assert summary['student']['last']['round'] == 2
  assert summary['device']['count'] == 1
  assert (tmp_path / 'run' / 'images.png').exists()
  assert [set(line) >= {'loss', 'synthetic_agreement'}
          for line in toy_runs.metrics(tmp_path / 'run')] == [True, True]


def test_a_method_of_ones_own_is_checked(uniform, tmp_path):
  uniform.job = 'check'
  assert train.run(uniform, tmp_path / 'run')['values']['one_hot'] > 0
  uniform.update(job='distill', method=dict(darkest=1.5, brightest=1.0))
  with pytest.raises(ValueError, match=r'darkest is 1\.5, must be below 1') as error:
    train.run(uniform, tmp_path / 'run')
  assert len(error.value.problems) == 2
  assert "'brightest' is no argument of uniform" in str(error.value)


def test_quick_start(tmp_path):
  """The quick start reaches 0.9 of the teacher's accuracy, its short form 0.65.

  `.ci/run` has run the quick start, and names its summary.
  """
  if 'QUICK_START_SUMMARY' in os.environ:
    summary, least = json.loads(pathlib.Path(os.environ['QUICK_START_SUMMARY']).read_text()), 0.9
  else:
    config = default.get_config('smoke')
    config.num_devices = 1
    jax.config.update('jax_disable_most_optimizations', False)
    summary, least = train.run(config, tmp_path), 0.65
  assert summary['teacher']['top1'] >= 0.915
  assert summary['student']['last']['top1'] >= least * summary['teacher']['top1']
  assert 4 * summary['parameters']['student'] <= summary['parameters']['teacher']
