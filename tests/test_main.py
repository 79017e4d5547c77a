import json

import jax
import numpy as np
import pytest
import toy_runs
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dfkd_jax import cli, models, train, weights
from dfkd_jax.cli import override
from dfkd_jax.config import fields
from dfkd_jax.config.check import check_values
from dfkd_jax.config.field import is_inside
from dfkd_jax.config.fields import leaves
from dfkd_jax.config.problems import Problems, raise_problems
from dfkd_jax.config.records import resolve
from dfkd_jax.runs import signals as run_signals

CONFIG = """
import toy_runs

def get_config(arguments=''):
  if arguments not in ('', 'kind'):
    raise ValueError(f'Unknown config argument {arguments!r}. Known: kind.')
  return toy_runs.config()
"""


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


@pytest.fixture(scope='module')
def config_file():
  path = toy_runs.folder() / 'toy.py'
  path.write_text(CONFIG)
  return str(path)


@pytest.fixture
def call(config_file, tmp_path, monkeypatch, capsys):
  """Runs main with arguments; returns status and lines of both streams."""
  monkeypatch.chdir(tmp_path)

  def call(*arguments, config=config_file):
    given = [] if config is None else [f'--config={config}']
    status = cli.main(['main.py', *given, *arguments])
    seen = capsys.readouterr()
    return status, seen.out.splitlines(), seen.err.splitlines()

  return call


def test_runs_a_config_and_sets_fields(call, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  status, out, err = call(
      '--workdir=here', '--config.evaluate.every=3', '--config.seed', '3', '--config.grid.rows=2')
  assert status == 0
  assert 'Results go to here' in err  # After what was seen of the teacher.
  assert any(line.startswith('student, last') for line in out)
  summary = json.loads((tmp_path / 'here' / 'summary.json').read_text())
  assert (summary['seed'], summary['config']['evaluate']['every'],
          summary['config']['grid']['rows']) == (3, 3, 2)
  assert ['top1' in line for line in toy_runs.metrics(tmp_path / 'here')] == [
      False, False, True, False, True]
  assert summary['command'].startswith('python main.py --config=')
  assert summary['command'].endswith('--config.seed 3 --config.grid.rows=2')


@pytest.mark.parametrize(('name', 'workdir'), [
    ('configs/default.py', 'runs/default'),
    ('configs/cifar10.py:fast_dfkd,fast2', 'runs/cifar10-fast_dfkd-fast2'),
    ('elsewhere/mine.py:', 'runs/mine')])
def test_the_default_workdir_tells_the_config(name, workdir):
  assert cli.default_workdir(name) == workdir


def test_without_arguments_it_is_the_quick_start(call, monkeypatch):
  seen = []
  monkeypatch.setattr(train, 'run', lambda *arguments, **more: seen.append((arguments, more)) or {})
  assert call(config=None)[0] == 0
  ((config, workdir), more), = seen
  assert (config.dataset.name, config.method.name,
          workdir) == ('fashion_mnist', 'fast_dfkd', 'runs/default')
  assert isinstance(more.pop('signals'), run_signals.StopRequest)
  assert more == {'command': 'python main.py', 'resume': None}
  assert config.is_locked


def test_fields_of_any_kind_are_set(config_file):
  config = cli.load(config_file)
  override(config, [
      '--config.student.options.widths=(4,5,6)', '--config.num_devices=2', '--config.control',
      '--config.labels=balanced', '--config.dataset.image_shape=(4,8,3)',
      '--config.factors.l2=1e-3', '--noconfig.optimizer.nesterov'])
  assert config.student.options.widths == (4, 5, 6)
  assert (config.num_devices, config.control, config.labels) == (2, True, 'balanced')
  assert (config.dataset.image_shape, config.factors.l2,
          config.optimizer.nesterov) == ((4, 8, 3), 1e-3, False)


def test_options_that_a_config_leaves_open_are_set(config_file):
  """Numbers, texts and tuples, which the networks take or refuse."""
  config = cli.load(config_file)
  with config.unlocked():
    config.teacher.options, config.generator.options = {}, {}
  override(config, [
      '--config.teacher.options.shortcut=pad', '--config.teacher.options.epsilon=1e-3',
      '--config.judge.options.depth=8',
      '--config.generator.options.widths=(3,2)', '--config.student.options.widths=None'])
  assert config.teacher.options.to_dict() == {'shortcut': 'pad', 'epsilon': 1e-3}
  assert (config.judge.options.depth, config.generator.options.widths) == (8, (3, 2))
  assert config.student.options.widths is None  # The network's own default.
  assert resolve(config).student.options == {'strides': (1, 2)}


def test_none_is_none_where_a_field_may_be(config_file):
  config = cli.load(config_file)
  with config.unlocked():
    config.method.restart_every = 50
  override(config, [
      '--config.method.restart_every=None', '--config.dataset.name=None',
      '--config.num_devices=None', '--config.precision=None', '--config.teacher.resize=None',
      '--config.augment.student.pad=None'])
  for value in (config.method.restart_every, config.dataset.name, config.num_devices,
                config.precision, config.teacher.resize, config.augment.student.pad):
    assert value is None
  for field in ('distill.rounds', 'optimizer.learning_rate', 'control', 'student.mean',
                'method.num_steps'):
    config = cli.load(config_file)
    override(config, [f'--config.{field}=None'])
    with pytest.raises(ValueError, match=rf'{field} is \(?None,?\)?, must be'):
      raise_problems(check_values, config)


def test_no_data_set_is_not_one_of_that_name(call):
  status, _, err = call('--config.dataset.name=None', '--config.job=train')
  assert status == 2
  assert any('dataset.name is None' in line for line in err)


def test_an_option_that_a_network_does_not_know_is_refused(call):
  status, _, err = call('--config.student.options.shortcutt=pad')
  assert (status, len(err)) == (2, 1)
  assert 'student.options' in err[0]
  assert 'shortcutt' in err[0]


def test_help_says_how(capsys):
  with pytest.raises(SystemExit) as end:
    cli.main(['main.py', '--help'])
  text = capsys.readouterr().out
  assert end.value.code == 0
  for word in ('--config', '--workdir', 'configs/cifar10.py:fast_dfkd', '--config.FIELD=VALUE',
               'configs/default.py'):
    assert word in text
  for field in fields.BY_NAME.values():
    assert f'--config.{field.name}' in text


def save(path, **changes):
  """Weights of a toy teacher of which something differs."""
  options = toy_runs.NETWORKS['teacher'] | {k: v for k, v in changes.items()
                                            if k in ('widths', 'strides')}
  module = models.create('convnet', changes.get('classes', toy_runs.CLASSES), **options)
  network = models.create_network(module, jax.random.key(0), changes.get('image', toy_runs.IMAGE))
  variables = jax.tree.map(np.array, {'params': network.params, 'batch_stats': network.batch_stats})
  if changes.get('broken'):
    variables['params']['conv2']['kernel'][0, 0, 0, 0] = np.nan
    save_file(traverse_util.flatten_dict(variables, sep='.'), str(path))
  else:
    weights.save_safetensors(path, variables)


BAD = {
    'method': (['--config.method.name=fast_dfdk'], ["'fast_dfdk'", "'fast_dfkd'"]),
    'model': (['--config.student.name=resnet_20'], ["'resnet_20'", "'resnet20'", 'wrn16_1']),
    'teacher model': (['--config.teacher.name=wrn40'], ["'wrn40'", 'wrn<depth>_<widen>']),
    'depth': (['--config.student.name=wrn17_1'], ['17']),
    'option of a model': (['--config.student.name=vgg11'], ["'vgg11'", 'widths']),
    'width of a model': (['--config.student.options.widths=(0,3)'], ['student.options', '(0, 3)']),
    'dataset': (['--config.dataset.name=toi'], ["'toi'", "'toy'", 'dfkd_jax.prepare']),
    'dataset not prepared': (
        ['--config.dataset.data_dir=nowhere'],
        ["'toy'", 'nowhere', 'dfkd_jax.prepare folder --name toy']),
    'split': (['--config.dataset.test_split=tset'], ["'tset'", 'test, train']),
    'no dataset': (['--config=CONFIGS/common.py'], ['common.py', 'get_config']),
    'section': (['--config.distil.rounds=3'], ["'distil.rounds'", "'distill.rounds'", '--help']),
    'field': (['--config.distill.round=3'],
              ["'distill.round'", "'distill.rounds'", '--help']),
    'field of a number': (['--config.seed.x=3'], ["'seed.x'", "'seed'"]),
    'whole number': (['--config.seed=abc'], ['seed is', "'abc'", 'whole number']),
    'number': (['--config.optimizer.learning_rate=fast'],
               ['optimizer.learning_rate', "'fast'", 'a number']),
    'half a round': (['--config.distill.rounds=1.5'], ['distill.rounds', "'1.5'", 'whole number']),
    'yes or no': (['--config.control=maybe'], ['control is', "'maybe'", 'True or False']),
    'tuple': (['--config.teacher.mean=(1,'], ['teacher.mean', 'tuple']),
    'section as a number': (['--config.dataset=3'], ['config.dataset', 'section']),
    'argument': (['--wrokdir=x'], ["'--wrokdir'", "'--workdir'", '--help']),
    'word': (['quickly'], ["'quickly'", '--help']),
    'value': (['--workdir'], ['--workdir', 'expected one argument']),
    'config file': (['--config=configs/cifar10.yaml'],
                    ["'configs/cifar10.yaml'", 'configs/cifar10.py']),
    'missing config file': (['--config=configs/cifar11.py:kd'],
                            ["'configs/cifar11.py'", "'configs/cifar10"]),
    'config argument': (['--config=configs/cifar10.py:fast3'],
                        ["'fast3'", 'fast10', 'wrn40_2-wrn16_1']),
    'job': (['--config.job=distil'], ["'distil'", "'distill'", 'train']),
    'rounds': (['--config.distill.rounds=0'], ['distill.rounds is 0', '[1, inf)']),
    'steps': (['--config.method.num_steps=0'], ['method.num_steps is 0', '[1, inf)']),
    'rate': (['--config.optimizer.learning_rate=-0.1'],
             ['optimizer.learning_rate is -0.1', '(0, inf)']),
    'not a number': (['--config.method.latent_lr=nan'], ['method.latent_lr is nan', '(0, inf)']),
    'infinite': (['--config.factors.batch_norm=inf'], ['factors.batch_norm is inf', '[0, inf)']),
    'latents': (['--config.method.latent_dim=0'], ['method.latent_dim is 0']),
    'no student steps': (['--config.distill.distill_after=5'],
                         ['distill_after is 5', 'distill.rounds, 5']),
    'capacity': (['--config.method.capacity=3'], ['method.capacity is 3', 'at least 4']),
    'tasks by devices': (['--config.num_devices=3'], ['method.num_tasks is 1', 'multiple of 3']),
    'batch by tasks': (['--config.method.num_tasks=3'],
                       ['distill.batch_size is 4', 'multiple of 3']),
    'capacity by tasks': (
        ['--config.method.num_tasks=4', '--config.method.capacity=18'],
        ['method.capacity is 18', 'multiple of 4']),
    'devices': (['--config.num_devices=5'], ['num_devices is 5', '1..4']),
    'labels': (['--config.labels=balance'], ["'balance'", "'balanced'", 'stratified']),
    'augmentation': (['--config.augment.student.name=shuft'], ["'shuft'", "'shift'"]),
    'generator schedule': (
        ['--config=CONFIGS/default.py:dfq', '--config.method.generator_schedule=cosinus'],
        ["'cosinus'", "'cosine'"]),
    'generator': (['--config.generator.name=generater'], ["'generater'", "'generator'"]),
    'schedule': (['--config.optimizer.schedule=cosinus'], ["'cosinus'", 'cosine_by_step']),
    'channels': (['--config.dataset.image_shape=(12,8,3)'], ['(12, 8, 1)', '(12, 8, 3)']),
    'size': (['--config.dataset.image_shape=(8,8,1)'], ['(12, 8, 1)', '(8, 8, 1)']),
    'axes': (['--config.dataset.image_shape=(12,8)'],
             ['dataset.image_shape is (12, 8)', '3 whole numbers']),
    'normalisation': (['--config.student.mean=(0.1,0.2)'],
                      ['student.mean is (0.1, 0.2)', '1 channels']),
    'no deviation': (['--config.teacher.std=(0.0,)'], ['teacher.std is (0.0,)', '(0, inf)']),
    'classes': (['--config.dataset.num_classes=6'], ['dataset.num_classes is 6', 'must be 5']),
    'no weights': (['--config.teacher.source=teacher.pth'], ["'teacher.pth'", 'no such file']),
    'embedded weights': (['--config.teacher.source=embedded:fashion'],
                         ["'fashion'", 'embedded teacher']),
    'weights of another width': (
        ['--config.teacher.source=wide.safetensors'], ['batch_stats.bn1.mean', '(4,)', '(3,)']),
    'weights of other classes': (
        ['--config.teacher.source=classes.safetensors'],
        ['does not fit', '6 classes', 'dataset.num_classes']),
    'weights of other channels': (
        ['--config.teacher.source=colour.safetensors'],
        ['params.conv1.kernel', '(3, 3, 3, 3)', '(3, 3, 1, 3)']),
    'weights not finite': (['--config.teacher.source=broken.safetensors'],
                           ['params.conv2.kernel', 'not finite']),
    'no weights at all': (['--config.teacher.source=notes.txt'],
                          ['notes.txt', 'it is none of safetensors']),
    'no embeddings': (['--config=CONFIGS/default.py:nayer', '--config.method.embeddings=none.npy'],
                      ["'none.npy'"]),
    'embeddings of text': (
        ['--config=CONFIGS/default.py:nayer', '--config.method.embeddings=notes.txt'],
        ['notes.txt', 'one array of numbers']),
    'embeddings where there are none': (['--config.method.embeddings=a.npy'],
                                        ["'method.embeddings'"]),
    'beta': (['--config=CONFIGS/default.py:ssd_kd', '--config.method.beta=1'],
             ['beta is 1.0', 'never settle']),
    'gamma': (['--config=CONFIGS/default.py:ssd_kd', '--config.method.gamma=-1'],
              ['method.gamma is -1.0', '[0, inf)']),
    'ramp': (['--config=CONFIGS/default.py:cu_dfkd', '--config.method.adversarial.end=3'],
             ['end of a ramp is 3']),
    'bank': (['--config=CONFIGS/default.py:cmi', '--config.method.bank_size=128'],
             ['bank_size is 128', 'above 128']),
    'variant': (['--config=CONFIGS/cifar10.py:dafl,fast10'], ["'fast10'", "'dafl'", 'SSD-KD']),
    'average': (['--config=CONFIGS/default.py:dfq', '--config.method.ema_decay=1'],
                ['method.ema_decay is 1.0']),
    'share of the average': (
        ['--config=CONFIGS/default.py:dfq', '--config.method.ema_decay=0.9',
         '--config.method.ema_share=0.001'],
        ['ema_share is 0.001', 'of the 64 images']),
    'average of what does not last': (
        ['--config=CONFIGS/default.py:nayer', '--config.method.ema_decay=0.9',
         '--config.method.redraw_every=1'],
        ['ema_decay is 0.9', 'None']),
    'workdir': (['--workdir=notes.txt/run'], ['notes.txt/run', 'must be a folder']),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_costs_one_line_and_writes_nothing(name, call, tmp_path):
  arguments, pieces = BAD[name]
  arguments = [argument.replace('CONFIGS', str(toy_runs.ROOT / 'configs'))
               for argument in arguments]
  (tmp_path / 'notes.txt').write_text('Nothing of interest.')
  if 'weights of' in name or 'not finite' in name:
    save(tmp_path / 'wide.safetensors', widths=(4, 6))
    save(tmp_path / 'classes.safetensors', classes=6)
    save(tmp_path / 'colour.safetensors', image=(12, 8, 3))
    save(tmp_path / 'broken.safetensors', broken=True)
  before = toy_runs.tree_of(tmp_path)
  status, out, err = call(*arguments)
  assert status == 2
  assert out == []
  assert len(err) == 1
  assert err[0].startswith('error: ')
  for piece in pieces:
    assert piece in err[0]
  assert toy_runs.tree_of(tmp_path) == before
  assert not (tmp_path / 'runs').exists()


def test_two_problems_are_two_lines(call):
  status, _, err = call('--config.seed=-1', '--config.factors.one_hot=-2')
  assert status == 2
  assert len(err) == 2
  assert 'seed is -1' in err[0]
  assert 'factors.one_hot is -2.0' in err[1]


NUMBERS = [name for name, field in fields.BY_NAME.items() if field.kind in (int, float)
           and isinstance(field.allowed, str)]


@pytest.mark.parametrize('name', sorted(NUMBERS))
@settings(max_examples=8, deadline=None)
@given(drawn=st.floats(-1e6, 1e6, allow_subnormal=False, width=32))
def test_numbers_out_of_range_are_named(name, drawn):
  """A number is refused as such if, and only if, it lies outside; the ends are tried always."""
  field = fields.BY_NAME[name]
  low, high = (float(end) for end in field.allowed[1:-1].split(','))
  *sections, last = name.split('.')
  for number in (low, high, drawn):
    number = int(number) if field.kind is int and abs(number) < 2**40 else number
    config = toy_runs.config()
    config.unlock()
    inner = config
    for section in sections:
      inner[section] = inner.get(section) or {}
      inner = inner[section]
    with inner.ignore_type():
      inner[last] = number if field.length is None else (number,) * (field.length or 1)
    problems = Problems()
    problems.run(check_values, config)
    lines = [str(error) for error in problems.errors if error.field == name]
    assert bool(lines) == (not is_inside(number, field.allowed))
    for line in lines:
      assert len(line.splitlines()) == 1
      assert f'{name} is' in line
      assert f'in {field.allowed}' in line


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_misspelt_fields_are_named(data):
  config = toy_runs.config().lock()
  known = list(dict(leaves(config)))
  field = data.draw(st.sampled_from(known))
  place = data.draw(st.integers(0, len(field) - 1))
  letter = data.draw(st.sampled_from('abcxyz_'))
  misspelt = field[:place] + letter + field[place + 1:]
  if misspelt in known or '.options.' in misspelt:  # Networks know their options.
    return
  with pytest.raises(ValueError, match='Unknown') as error:
    override(config, [f'--config.{misspelt}=1'])
  assert repr(misspelt) in str(error.value)
  assert len(str(error.value).splitlines()) == 1
  near = str(error.value).partition('Did you mean ')[2]
  assert len(field) < 5 or near


def test_an_interrupted_run_says_how_to_go_on(call, monkeypatch):
  def interrupt(*arguments, **more):
    raise KeyboardInterrupt

  monkeypatch.setattr(train, 'run', interrupt)
  status, _, err = call()
  assert status == 130
  assert len(err) == 1
  assert 'goes on' in err[0]


def test_what_is_not_foreseen_keeps_its_traceback(call, monkeypatch):
  def fail(*arguments, **more):
    raise ZeroDivisionError

  monkeypatch.setattr(train, 'run', fail)
  with pytest.raises(ZeroDivisionError):
    call()


def test_a_traceback_can_be_asked_for(call):
  with pytest.raises(ValueError, match='num_devices'):
    call('--traceback', '--config.num_devices=9')


@pytest.mark.parametrize(('text', 'pieces'), [
    ('def get_config():\n  return nothing\n', ['line 2: NameError', "'nothing'"]),
    ('import nothing_of_this_name\n', ['line 1: ModuleNotFoundError', 'nothing_of_this_name']),
    ('from configs import cifr10\n', ['line 1: ImportError', 'cifr10']),
    ('def get_config(:\n', ['invalid syntax']),
    ('import sys\n\nsys.exit(0)\n', ['line 3: SystemExit']),
    (
        'from configs import default\n\ndef get_config():\n  config = default.get_config()\n'
        '  config.distil.rounds = 3\n',
     ['line 5: AttributeError', 'distil'])])
def test_a_config_with_a_mistake_in_it_is_told_by_its_line(call, tmp_path, text, pieces):
  (tmp_path / 'mine.py').write_text(text)
  status, out, err = call(config='mine.py')
  assert (status, out, len(err)) == (2, [], 1)
  for piece in ("'mine.py'", *pieces):
    assert piece in err[0]


def test_a_device_without_room_is_one_line(call, monkeypatch):
  def fail(*arguments, **more):
    raise jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nThere was\x1b[31m more.')

  monkeypatch.setattr(train, 'run', fail)
  status, _, err = call()
  assert (status, len(err)) == (1, 1)
  assert 'RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes. There was\\x1b[31m more.' in err[0]
  assert '--traceback' in err[0]


@pytest.mark.parametrize(('arguments', 'piece'), [
    (['--config.distil.rounds=3'], "'distill.rounds'"),
    (['--config.dataset.name=fashion'], "'fashion_mnist'")])
def test_as_a_process_bad_input_is_one_line(arguments, piece, tmp_path):
  found = toy_runs.process(*arguments, cwd=tmp_path)
  assert found.returncode == 2
  assert found.stdout == ''
  line, = found.stderr.splitlines()
  assert line.startswith('error: ')
  assert piece in line
  assert list(tmp_path.iterdir()) == []
