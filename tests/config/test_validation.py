import functools
import os

import jax
import pytest
import toy_runs
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default
from dfkd_jax import synth, train
from dfkd_jax.config import build, docs, fields
from dfkd_jax.config.check import is_single_process
from dfkd_jax.config.field import NO_DEFAULT, is_inside
from dfkd_jax.config.problems import InvalidError
from dfkd_jax.config.records import Distributed, resolve
from dfkd_jax.jobs import distillation
from dfkd_jax.runs.loop import Start


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


# Each wrong by itself, wherever the others are; where two are of one field, one of them is tried.
FAULTS = {
    'job': dict(job='distil'), 'seed': dict(seed=-1), 'buffer': dict(buffer='disk'),
    'labels': dict(labels='balance'),
    'precision': dict(precision='hihgest'), 'compute_dtype': dict(compute_dtype='float8'),
    'dataset.name': dict(dataset__name='toi'),
    'dataset.test_split': dict(dataset__test_split='tset'),
    'dataset.image_shape': dict(dataset__image_shape=(12, 8)),
    'generator.name': dict(generator__name='generater'),
    'teacher.name': dict(teacher__name='convet'),
    'teacher.source': dict(teacher__source='nowhere.pth'),
    'student.name': dict(student__name='resnet_20'), 'student.mean': dict(student__mean=(0.1, 0.2)),
    'judge.name': dict(judge__source='embedded:fashion_mnist_convnet'),
    'method.name': dict(method__name='fast_dfdk'), 'method.capacity': dict(method__capacity=3),
    'method.num_steps': dict(method__num_steps=0),
    'method.latent_lr': dict(method__latent_lr=float('nan')),
    'factors': dict(factors__one_hot=-1.0),
    'augment.student': dict(augment__student__name='shuft'),
    'augment.synthesis': dict(augment__synthesis__name='flop'),
    'distill.divergence': dict(distill__divergence='js'),
    'distill.distill_after': dict(distill__distill_after=5),
    'distill.steps_per_round': dict(distill__calls_per_round=2),
    'optimizer.schedule': dict(optimizer__schedule='cosinus'),
    'optimizer.name': dict(optimizer__name='adamm'), 'num_devices': dict(num_devices=9),
}
HIDDEN = {  # What cannot be asked where another is wrong.
    'job': {'dataset.name', 'dataset.test_split', 'teacher.name', 'teacher.source', 'student.name',
            'judge.name', 'method.name', 'method.capacity', 'augment.student', 'augment.synthesis',
            'distill.distill_after', 'distill.steps_per_round', 'num_devices'},
    'dataset.image_shape': {'student.mean', 'teacher.name', 'student.name', 'augment.student',
                            'augment.synthesis'},
    'compute_dtype': {'teacher.name', 'student.name'},
}
WORKDIR = 'in/a/new/folder'


def problems_of(workdir=WORKDIR, teacher=None, **changes):
  return check(toy_runs.config(**changes), workdir, teacher)


def check(config, workdir=WORKDIR, teacher=None):
  """The lines that `train.run` would raise before it does anything."""
  try:
    train.check(config, Start(workdir), teacher)
  except InvalidError as error:
    return error.problems
  return ()


@functools.cache
def alone(name):
  line, = problems_of(**FAULTS[name])
  return line


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_is_one_line_that_names_it(name):
  line = alone(name)
  value = str(next(iter(FAULTS[name].values())))
  assert value in line or name in line
  assert len(line.splitlines()) == 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from(sorted(FAULTS)), min_size=2, max_size=6))
def test_all_faults_are_told_at_once_each_once_and_without_what_follows(chosen):
  if 'dataset.name' in chosen:  # The line of the name has the split.
    chosen = chosen - {'dataset.test_split'}
  hidden = set().union(*(HIDDEN.get(name, set()) for name in chosen))
  seen = problems_of(**{field: value for name in chosen for field, value in FAULTS[name].items()})
  single = {name: alone(name) for name in chosen - hidden}
  assert len(seen) == len(single)
  assert set(seen) == set(single.values())


def test_what_does_not_fit_the_images_is_named():
  changes = dict(student__name='vgg13_bn', teacher__name='vgg16_bn', dataset__image_shape=(4, 4, 1))
  config = toy_runs.config(**changes)
  for which in ('teacher', 'student'):
    config[which].options = {}
  seen = check(config)
  assert len(seen) == 2
  for line, model in zip(seen, ('vgg16_bn', 'vgg13_bn'), strict=True):
    assert model in line
    assert '(4, 4, 1)' in line


def test_numbers_of_a_method_are_told_together():
  config = default.get_config('cu_dfkd')
  config.num_devices = 1
  config.method.adversarial.end = 3
  config.method.update(curriculum_kind='lag', sample_by='run')
  seen = check(config)
  for piece in ('end of a ramp is 3', "'lag'", "'run'"):
    assert sum(piece in line for line in seen) == 1
  assert len(seen) == 3


def test_the_table_of_fields_has_every_default_in_its_interval():
  assert len(fields.BY_NAME) == len(fields.RUN_FIELDS) + len(fields.METHOD_FIELDS)
  for field in fields.RUN_FIELDS:
    assert field.kind is dict or field.error(field.default) is None
    assert field.doc
  assert {field.name for field in fields.METHOD_FIELDS if field.default is not NO_DEFAULT} == set()
  factors = [name.removeprefix('factors.') for name in fields.BY_NAME
             if name.startswith('factors.')]
  assert set(factors) == set(synth.Factors._fields)


def test_numbers_of_methods_in_the_table_are_arguments_of_one():
  taken = {number for name in synth.names() for number in synth.parameters(name)}
  taken |= {'generator_schedule', 'generator_milestones', 'generator_gamma'}
  assert {field.name.split('.')[1] for field in fields.METHOD_FIELDS} <= taken


def test_the_documentation_of_fields_is_that_of_the_table():
  """Else: python -m dfkd_jax.config.docs > docs/configuration.md."""
  assert (toy_runs.ROOT / 'docs' / 'configuration.md').read_text() == docs.as_markdown()
  for field in fields.BY_NAME.values():
    assert f'| `{field.name}`' in docs.as_markdown()
    assert f'--config.{field.name}' in docs.as_text()


@pytest.mark.parametrize(('interval', 'inside', 'outside'), [
    ('[0, 1)', (0, 0.5), (-1, 1, float('nan'))), ('(0, 1]', (0.1, 1), (0, 1.1)),
    ('[1, inf)', (1, 2**40), (0, float('inf')))])
def test_intervals(interval, inside, outside):
  assert all(is_inside(number, interval) for number in inside)
  assert not any(is_inside(number, interval) for number in outside)


def test_fields_that_are_missing_or_misspelt_in_a_file_are_named():
  config = toy_runs.config()
  del config.distill.rounds
  config.distill.round = 5
  config.optimiser = 3
  lacking, one, other = check(config)
  assert 'distill.rounds' in lacking
  assert "'distill.round'. Did you mean 'distill.rounds'?" in one
  assert "'optimiser'" in other
  config = toy_runs.config()
  with config.ignore_type():
    config.distill = 3
  line, = check(config)
  assert 'distill is 3, must be a section' in line


@pytest.mark.parametrize(('changes', 'pieces'), [
    (dict(teacher__source=None), ['teacher.source is None']),
    (dict(student__name=None), ['student.name is None', 'convnet']),
    (dict(teacher__resize=(3.5, 2)), ['teacher.resize is (3.5, 2)', 'whole']),
    (dict(dataset__image_shape=(12.0, 8, 1)), ['dataset.image_shape is (12.0, 8, 1)', 'whole']),
    (dict(student__mean=('a',)), ["student.mean is ('a',)"]),
    (dict(augment__student__pad=-2), ['augment.student.pad is -2']),
    (dict(augment__student__name='resized_crop', augment__student__pad=None,
          augment__student__scale=(0.9, 0.2)),
     ['augment.student.scale is (0.9, 0.2)']),
    (dict(generator__options=dict(width=-3)), ["generator.options is {'width': -3}"]),
    (dict(generator__options=dict(depth=3)), ["'depth'"]),
    (dict(factors__one_hot=0.0, factors__batch_norm=0.0, factors__adversarial=0.0),
     ['all factors are 0']),
    (dict(job='train', train__label_factor=0.0),
     ['train.label_factor and train.teacher_factor are 0']),
    (dict(job='train', train__network='judge'), ["'judge'", 'teacher, student']),
    (dict(job='train', dataset__name=None), ['dataset.name is None']),
    (dict(job='train', num_devices=3), ['train.batch_size is 8', 'multiple of 3']),
    (dict(job='train', dataset__train_split='trian', dataset__test_split='test'), ["'trian'"]),
    (dict(job='check', method__name=None), ['method.name is None']),
    (dict(compilation_cache=__file__), ['compilation_cache', 'must be a folder']),
])
def test_further_faults(changes, pieces):
  line, = problems_of(**changes)
  for piece in pieces:
    assert piece in line


def test_the_folder_is_looked_at_with_the_rest(tmp_path):
  (tmp_path / 'file').write_text('here')
  os.symlink(tmp_path / 'loop', tmp_path / 'loop')
  for name, piece in (('file/run', 'file'), ('loop', 'broken link'), ('loop/run', 'broken link'),
                      ('x' * 256, 'too long'), ('a\0b', 'a path')):
    first, second = problems_of(workdir=tmp_path / name, seed=-1)
    assert 'seed' in first
    assert second.startswith('workdir is ')
    assert piece in second
  assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'loop']


def test_a_teacher_in_python_stands_for_that_of_the_config():
  teacher = build.fresh_network(resolve(toy_runs.config()).teacher, jax.random.key(0))
  assert problems_of(teacher=teacher, teacher__source=None, teacher__name='nobody') == ()
  line, = problems_of(teacher=teacher, job='train')
  assert 'must be None' in line


@pytest.mark.parametrize('job', ['distill', 'train', 'check'])
def test_every_job_is_validated_before_anything_is_done(job, tmp_path, monkeypatch):
  monkeypatch.setattr(distillation, 'run', None)
  with pytest.raises(InvalidError) as error:
    train.run(toy_runs.config(job=job, seed=-1, student__name='resnet_20',
                              train__network='student'), tmp_path / 'run')
  assert len(error.value.problems) == 2
  assert list(tmp_path.iterdir()) == []


def test_processes_that_wait_for_each_other_are_checked_before(monkeypatch):
  monkeypatch.delenv('SLURM_STEP_NUM_TASKS', raising=False)
  assert is_single_process(Distributed(None, None, None, 300))
  assert is_single_process(Distributed(None, 1, None, 300))
  assert not is_single_process(Distributed(None, 2, None, 300))
  assert not is_single_process(Distributed('auto', None, None, 300))
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '3')
  assert not is_single_process(Distributed(None, None, None, 300))


def test_an_error_says_all_in_its_text():
  error = InvalidError(['One is wrong.', 'So is another.'])
  assert isinstance(error, ValueError)
  assert str(error) == 'One is wrong. So is another.'
  assert error.problems == ('One is wrong.', 'So is another.')


@pytest.mark.parametrize('name', ['teacher', 'student'])
def test_networks_are_looked_at_without_numbers(name):
  """A width that would take all memory costs nothing here."""
  config = toy_runs.config()
  config[name].options.widths = (60_000, 60_000)
  assert check(config) == ()
