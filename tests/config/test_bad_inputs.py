"""Generated bad configs, config files and folders: at most three lines that name the value."""

import ast
import json
import math
import os

import jax
import pytest
import refusals
import toy_runs
from hypothesis import strategies as st
from refusals import folder, generate, refused, run_main

from dfkd_jax import augment, models, synth
from dfkd_jax.config.fields import leaves


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


def test_there_are_at_least_200():
  assert sum(refusals.COUNTS.values()) >= 200


# By hand: (low, whether it is allowed, high, whether it is allowed).
COUNT, LEAST_0, ABOVE_0, SHARE = (1, True, math.inf,
                                  False), (0, True, math.inf, False), (0, False, math.inf, False), (
    0, True, 1, False)
WHOLE = {
    'seed': (0, True, 2**32, False), 'dataset.num_classes': (2, True, math.inf, False),
    'num_devices': (1, True, 4, True), 'distill.distill_after': (0, True, 5, False),
    **dict.fromkeys((
        'distill.rounds', 'distill.steps_per_round', 'distill.batch_size', 'evaluate.every',
        'evaluate.batch_size',
        'checkpoint.every', 'checkpoint.max_to_keep', 'grid.rows', 'method.num_steps',
        'method.batch_size',
        'method.latent_dim', 'method.num_tasks', 'preflight.batch_size', 'distributed.timeout'),
        COUNT),
    **dict.fromkeys(('optimizer.warmup_steps', 'method.adversarial_after', 'augment.student.pad'),
                    LEAST_0)}
REAL = {
    **dict.fromkeys(('factors.one_hot', 'factors.batch_norm', 'optimizer.weight_decay',
                     'distill.attention_factor'),
                    LEAST_0),
    **dict.fromkeys(('optimizer.learning_rate', 'method.latent_lr', 'method.generator_lr',
                     'distill.temperature', 'device_memory_gb'), ABOVE_0),
    'optimizer.momentum': SHARE, 'train.label_smoothing': SHARE,
    'dataset.crop': (0, False, 1, True), 'optimizer.gamma': (0, False, 1, True)}


def outside(number, low, low_too, high, high_too):
  return not ((low < number or (low_too and number == low))
              and (number < high or (high_too and number == high)))


NUMBERS = st.one_of(
    st.tuples(st.sampled_from(sorted(WHOLE)),
              st.integers(-2**40, 2**40) | st.integers(-3, 6)).filter(
        lambda drawn: outside(drawn[1], *WHOLE[drawn[0]])),
    st.tuples(st.sampled_from(sorted(REAL)), st.floats() | st.integers(-2, 3).map(float)).filter(
        lambda drawn: outside(drawn[1], *REAL[drawn[0]])))


def test_numbers_out_of_their_range():

  def run(drawn):
    with folder() as here:
      refused(run_main(f'--config.{drawn[0]}={drawn[1]}', '--workdir=run'), here, drawn[0],
              drawn[1])

  generate('numbers', NUMBERS, run)


def parses(kind, text):
  try:
    kind(text)
  except ValueError:
    return False
  return True


TEXT = st.text(st.characters(codec='ascii', min_codepoint=33), min_size=1, max_size=9)
TYPES = st.one_of(
    st.tuples(st.sampled_from(sorted(WHOLE)),
              TEXT.filter(lambda text: not parses(lambda t: int(t, 0), text))),
    st.tuples(st.sampled_from(sorted(REAL)), TEXT.filter(lambda text: not parses(float, text))),
    st.tuples(st.sampled_from(['control', 'optimizer.nesterov', 'preflight.enabled', 'remat']),
              TEXT.filter(
        lambda text: text.lower() not in ('true', 'false', 't', 'f', '1', '0'))))


def test_values_of_another_type():

  def run(drawn):
    with folder() as here:
      refused(run_main(f'--config.{drawn[0]}={drawn[1]}', '--workdir=run'), here, drawn[0],
              repr(drawn[1]))

  generate('types', TYPES, run)


NAMES = {
    'method.name': synth.names(), 'student.name': models.names(), 'teacher.name': models.names(),
    'job': ('distill', 'train', 'check'), 'buffer': ('auto', 'device', 'host'),
    'labels': ('uniform', 'stratified', 'balanced'), 'optimizer.name': ('sgd', 'adam'),
    'optimizer.schedule': ('cosine_by_round', 'cosine_by_step', 'steps', 'constant'),
    'augment.student.name': tuple(augment._BY_NAME),
    'augment.synthesis.name': tuple(augment._BY_NAME),
    'generator.name': ('generator', 'spatial_generator'), 'compute_dtype': ('float32', 'bfloat16'),
    'precision': ('highest', 'float32'), 'distill.divergence': ('kl', 'l1', 'l2'),
    'dataset.name': ('toy', 'grey'), 'dataset.test_split': ('test', 'train'),
    'teacher.source': ('embedded:fashion_mnist_convnet', 'teacher.pth')}


@st.composite
def misspelt(draw):
  field = draw(st.sampled_from(sorted(NAMES)))
  name = draw(st.sampled_from(NAMES[field]))
  place = draw(st.integers(0, len(name)))
  found = name[:place] + draw(st.sampled_from('xq_7')) + name[place + draw(st.integers(0, 1)):]
  return field, found


def test_misspelt_names():

  def run(drawn):
    with folder() as here:
      name = drawn[1].removeprefix('embedded:')
      refused(run_main(f'--config.{drawn[0]}={drawn[1]}', '--workdir=run'), here, name)

  generate('names', misspelt().filter(lambda drawn: drawn[1] not in NAMES[drawn[0]]), run)


def test_misspelt_fields():
  config = toy_runs.config()
  known = list(dict(leaves(config)))
  letters = st.tuples(st.sampled_from(known), st.integers(0, 30), st.sampled_from('xyz_'))
  changed = letters.map(lambda drawn: drawn[0][:drawn[1]] + drawn[2] + drawn[0][drawn[1] + 1:])

  def run(field):
    with folder() as here:
      refused(run_main(f'--config.{field}=1', '--workdir=run'), here, repr(field))

  generate('fields',
           changed.filter(lambda field: field not in known and '.options.' not in field), run)


def pair(first, second):
  return st.tuples(first, second)


few, more = st.integers(1, 9), st.integers(2, 9)
PAIRS = st.one_of(
    pair(more, few).filter(lambda d: d[1] % d[0]).map(lambda d: (
        f'method.num_tasks={d[0]}', f'method.capacity={12 * d[0]}', f'distill.batch_size={d[1]}')),
    pair(more, few).filter(lambda d: d[1] % d[0]).map(lambda d: (
        f'distill.calls_per_round={d[0]}', f'distill.steps_per_round={d[1]}')),
    pair(few, few).filter(lambda d: d[1] >= d[0]).map(lambda d: (
        f'distill.rounds={d[0]}', f'distill.distill_after={d[1]}')),
    pair(more, few).filter(lambda d: d[1] < d[0]).map(lambda d: (
        f'method.batch_size={d[0]}', f'method.capacity={d[1]}')),
    pair(few, st.sampled_from(['cosine_by_round', 'steps', 'constant'])).map(lambda d: (
        f'optimizer.schedule={d[1]}', f'optimizer.warmup_steps={d[0]}')),
    pair(st.integers(1, 40), st.integers(1, 40)).filter(lambda d: d[0] % 4
                                                        or d[1] % 4).map(lambda d: (
        f'dataset.image_shape=({d[0]},{d[1]},1)',)),
    st.lists(st.integers(0, 3), min_size=2,
             max_size=4).map(lambda d: (f'student.mean={tuple(d)}',)),
    st.sampled_from([
        ('judge.source=teacher.pth',), ('judge.name=convnet',),
        ('num_devices=3', 'job=train', 'train.batch_size=8'),
        ('distributed.coordinator=here:123',), ('distributed.num_processes=2',),
        ('factors.contrast=1',),
        ('distributed.coordinator=here', 'distributed.num_processes=2', 'distributed.process_id=0'),
        ('augment.student.name=flip', 'augment.student.pad=3'), ('student.options.widths=(2,3,4)',),
        ('student.options.widths=(2,3)', 'student.options.strides=(1,2,2)'),
        ('seed=-1', 'job=chekc'), ('generator.options.width=0',), ('generator.options.width=-3',),
        ('student.options.widths=(0,3)',),
        ('teacher.resize=(3,)',), ('teacher.resize=(3.5,4)',), ('dataset.image_shape=(12.0,8,1)',),
        ('job=train', 'train.label_factor=0'),
        ('factors.one_hot=0', 'factors.batch_norm=0', 'factors.adversarial=0'),
        ('compilation_cache=/proc/version',)]))


def test_values_that_do_not_go_together():

  def run(drawn):
    name, _, value = drawn[-1].partition('=')
    others = {'factors.adversarial': 'factors', 'factors.contrast': 'contrast',
              'judge.source': 'judge.name', 'judge.name': 'judge.source'}
    piece = others.get(name, name.split('.')[-1])
    with folder() as here:
      pieces = [value] if name == 'job' else [] if 'image_shape' in name else [piece]
      refused(run_main(*(f'--config.{each}' for each in drawn), '--workdir=run'), here, *pieces)

  generate('pairs', PAIRS, run)


def is_python(text):
  try:
    ast.parse(text)
  except (SyntaxError, ValueError):
    return False
  return True


HEAD = 'import toy_runs\ndef get_config(kind=""):\n  config = toy_runs.config()\n'
MISTAKES = {
    '  return config.to_dict()': 'dict', '  return None': 'NoneType',
    '  raise ValueError("none\\n such")': 'none such',
    '  del config.distill\n  return config': 'distill.rounds',
    '  config.distil = 3\n  return config': "'distil'",
    '  del config.seed, config.method\n  return config': 'seed, method',
    '  config.method.depth = 3\n  return config': "'depth'",
    '  return config\nget_config = 3': 'get_config',
    '  return config\nraise ValueError("not today")': 'not today',
    '  return config\nopen("nowhere")': 'nowhere',
    **{f'  with config.ignore_type():\n    config.{field} = {value}\n  return config':
       f'{field} is {value}' for field, value in (
           ('seed', "'a'"), ('dataset', '(1, 2)'), ('student.mean', 0.3), ('student.name', 3),
           ('teacher.source', 3), ('distill.rounds', None), ('control', None), ('labels', None),
           ('student.options', 3), ('dataset.num_classes', '(1, 2)'), ('factors.one_hot', None))}}
FILES = st.one_of(
    st.text(st.characters(codec='utf-8'), min_size=1,
            max_size=40).filter(lambda text: not is_python(text)).map(
        lambda text: (text.encode(), "'mine.py'")),
    st.binary(min_size=1, max_size=40).filter(lambda data: not is_python(data)).map(
        lambda data: (data, "'mine.py'")),
    st.sampled_from([((HEAD + tail).encode(), piece) for tail, piece in MISTAKES.items()]),
    st.sampled_from([(data, 'mine.py') for data in (
        b'', b'# nothing', b'{"seed": 1}', b'seed = 1\n', b'def get_config(a, b):\n  pass\n',
        b'def get_config(*, a):\n  pass\n')]))


def test_files_that_are_no_configs():

  def run(drawn):
    with folder() as here:
      (here / 'mine.py').write_bytes(drawn[0])
      refused(run_main('--workdir=run', config='mine.py'), here, drawn[1])

  generate('config files', FILES, run)


@pytest.mark.parametrize('data',
                         [b'def get_config(:\n', b'\xff\xfe\0',
                          b'import toy_runs\nraise ValueError("no")\n'])
def test_the_file_is_named(data):
  with folder() as here:
    (here / 'mine.py').write_bytes(data)
    refused(run_main('--workdir=run', config='mine.py'), here, "'mine.py'")
    (here / 'folder.py').mkdir()
    os.symlink('loop.py', 'loop.py')
    for name in ('folder.py', 'loop.py', 'none.py', 'notes.txt', 'a\0b.py'):
      refused(run_main('--workdir=run', config=name), here, repr(name))


WORKDIRS = {
    'file': 'file', 'file/run': 'file', 'loop': 'loop', 'loop/run': 'loop', 'nowhere': 'nowhere',
    'x' * 300: 'too long',
    '/proc/version/run': '/proc/version', '/proc/sys/run': '/proc/sys', 'a\0b': 'a\\x00b',
    'other': 'another config',
    'other/../other': 'another config', 'part': 'no whole summary',
    '~nobody_of_this_name/run': 'nobody_of_this_name', 'a/' * 3000: 'too long'}


@pytest.fixture(scope='module')
def another_run():
  """What summary.json says of a run with another seed."""
  return {'config': toy_runs.config(seed=7).to_dict(), 'weights': {}, 'changed': [],
          'student': {'last': {}}}


def test_folders_that_are_no_place_for_a_run(another_run):

  def run(name):
    with folder() as here:
      (here / 'file').write_text('here')
      for kind, summary in (('other', another_run), ('part', {'config': another_run['config']})):
        (here / kind).mkdir()
        (here / kind / 'summary.json').write_text(json.dumps(summary))
      os.symlink('loop', 'loop')
      os.symlink('gone', 'nowhere')
      refused(run_main(f'--workdir={name}'), here, WORKDIRS[name])

  generate('workdirs', st.sampled_from(sorted(WORKDIRS)), run)


def test_all_that_is_wrong_is_told_in_three_lines():
  with folder() as here:
    refused(run_main(
        '--config.seed=-1', '--config.student.name=resnet_20', '--config.labels=balance',
        '--config.job=distill', '--config.dataset.name=toi', '--config.teacher.source=gone.pth',
        '--config.optimizer.name=adamm',
        '--workdir=/proc/version'), here, 'seed is -1', "'resnet_20'", "'balance'", "'toi'",
        "'gone.pth'", "'adamm'",
            '/proc/version')
  assert jax.process_count() == 1
