"""A contract over every file in configs/, and the numbers of the paper."""

import functools
import importlib.util
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs
from ml_collections import config_dict

from dfkd_jax import augment, synth, train, weights
from dfkd_jax.config import build, build_method
from dfkd_jax.config.check import check_structure, check_values
from dfkd_jax.config.problems import raise_problems
from dfkd_jax.config.records import resolve
from dfkd_jax.synth import schedules

FILES = {path.stem: path for path in sorted((toy_runs.ROOT / 'configs').glob('*.py'))}


def load(name):
  spec = importlib.util.spec_from_file_location(f'{name}_config', FILES[name])
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


MODULES = {name: load(name) for name in FILES}
CONFIGS = {name: module.get_config for name, module in MODULES.items()
           if hasattr(module, 'get_config') and name != 'regression'}  # That is for no run.
DISTILLING, TRAINING = ['cifar10', 'cifar100', 'default', 'cifar10_resnet56', 'imagenet'], [
    'teacher_cifar10', 'teacher_cifar100', 'teacher_fashion_mnist']


def arguments(name):
  """Returns each argument of a config alone, and none; its error lists them."""
  with pytest.raises(ValueError, match='Unknown config argument') as error:
    CONFIGS[name]('no_such_argument')
  return ['', *re.search(r'Known: (.*)\.$', str(error.value))[1].split(', ')]


EACH = [f'{name}:{argument}' for name in CONFIGS for argument in arguments(name)]


def get(each):
  name, _, argument = each.partition(':')
  return CONFIGS[name](argument)


def shapes_of(config, which):
  """Returns the shapes of a network's logits and of its parameters."""
  images = jax.ShapeDtypeStruct((1, *config.dataset.image_shape), 'float32')
  module = build.module(getattr(resolve(config), which))
  logits, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
  return logits.shape, variables['params']


def num_params(config, which):
  return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(config, which)[1]))


def fields(config, prefix=''):
  for name, value in config.items():
    yield prefix + name
    if hasattr(value, 'items') and f'{prefix}{name}' not in (
        'method', 'teacher.options', 'student.options', 'judge.options'):
      yield from fields(value, f'{prefix}{name}.')


def test_all_files_were_found():
  assert set(DISTILLING + TRAINING) <= set(CONFIGS)


@pytest.mark.parametrize('name', CONFIGS)
def test_says_what_it_is_and_how_to_run_it(name):
  text = MODULES[name].__doc__
  assert 'python main.py' in text
  assert list(inspect.signature(CONFIGS[name]).parameters) == ['arguments']
  assert CONFIGS[name]() == CONFIGS[name]('')


@pytest.mark.parametrize('each', EACH)
def test_has_no_stray_fields(each):
  config = get(each)
  known = set(fields(toy_runs.common.base()))
  assert set(fields(config)) - known <= {
      f'generator.options.{name}' for name in ('width', 'stem_width', 'widths', 'last')}
  assert known <= set(fields(config))


@pytest.mark.parametrize('each', EACH)
def test_passes_its_own_checks(each):
  raise_problems(check_structure, get(each))
  raise_problems(check_values, get(each))


SMALL = {'cifar10': 'resnet8', 'cifar100': 'resnet8', 'imagenet': 'resnet18_imagenet',
         'nyuv2': 'espnet'}
# Pairs, sizes and variants have tests of their networks and numbers. Of methods, two configs do.
BUILT = [each if each.endswith(':') or each in (
    f'{config}:{method}' for config in ('default', 'cifar10') for method in synth.names())
         else pytest.param(each, marks=pytest.mark.exhaustive) for each in EACH]


@pytest.mark.parametrize('each', BUILT)
def test_builds(each):
  config = get(each)
  config.num_devices = 1
  for which in ('teacher', 'student'):
    if config[which].name:
      shape, _ = shapes_of(config, which)
      masks = config.dataset.image_shape[:2] if config.task == 'segmentation' else ()
      assert shape == (1, *masks, config.dataset.num_classes)
  if small := SMALL.get(each.partition(':')[0]):  # A method's numbers go with any pair.
    for which in ('teacher', 'student'):
      config[which].update(name=small)
      config[which].options = {}
  traced(config.to_json())


@functools.cache
def traced(text):
  """Traces all parts of a run by shapes; once for equal configs."""
  config, key = config_dict.ConfigDict(json.loads(text)), jax.random.key(0)
  shapes = lambda function, *inputs: jax.eval_shape(function, key, *inputs)
  networks = {which: shapes(lambda key,
                            which=which: build.fresh_network(getattr(resolve(config), which), key))
              for which in ('teacher', 'student') if config[which].name}
  trained = networks['student' if config.job == 'distill' else config.train.network].params
  tx = build.optimizer(resolve(config).optimizer, 3, 2)
  updates, _ = jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), trained)
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, trained)
  image_shape = tuple(config.dataset.image_shape)
  images = jax.ShapeDtypeStruct((2, *image_shape), 'float32')
  size = tuple(resolve(config).augment.get('size', image_shape[:2]))
  augmented = shapes(augment.create(**resolve(config).augment), images)
  assert augmented.shape == (2, *size, image_shape[-1])
  if config.job != 'distill':
    return
  synthesizer = build_method.synthesizer(resolve(config).method, 1)(None)
  state = shapes(synthesizer.init, networks['teacher'])
  after, metrics = shapes(lambda key, state, *of: synthesizer.synthesize(state, key, *of), state,
                          *networks.values())
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
  assert all(metric.shape == (config.method.num_steps,) for metric in metrics.values())
  batch = shapes(lambda key, state: synthesizer.sample(state, key), state)
  made = tuple(config.generator.image_shape or image_shape)
  assert batch.images.shape == (config.distill.batch_size, *made)


@pytest.mark.parametrize('dataset', ['cifar10', 'cifar100'])
@pytest.mark.parametrize(('variant', 'num_steps', 'generator_lr', 'latent_lr', 'meta_lr'), [
    ('fast2', 2, 5e-3, 0.015, 0.010), ('fast5', 5, 3e-3, 0.010, 0.015),
    ('fast10', 10, 2e-3, 0.010, 0.020)])
@pytest.mark.parametrize(('pair', 'adversarial', 'one_hot'), [
    ('resnet34-resnet18', 1.33, 0.5), ('vgg11-resnet18', 1.0, 0.5), ('wrn40_2-wrn16_1', 1.1, 0.4),
    ('wrn40_2-wrn40_1', 1.1, 0.4), ('wrn40_2-wrn16_2', 1.1, 0.4)])
def test_numbers_of_the_published_pairs(
    dataset, variant, num_steps, generator_lr, latent_lr, meta_lr, pair, adversarial, one_hot):
  """The table of the published CIFAR script (arXiv:2112.06253)."""
  config = CONFIGS[dataset](','.join((variant, pair, 'fast_dfkd')))
  assert (config.teacher.name, config.student.name) == tuple(pair.split('-'))
  method, factors = config.method, config.factors
  assert (method.num_steps, method.generator_lr,
          method.latent_lr) == (num_steps, generator_lr, latent_lr)
  assert method.meta_lr is None  # Then it is their product.
  assert method.generator_lr * method.num_steps == pytest.approx(meta_lr)
  assert (factors.adversarial, factors.one_hot, factors.batch_norm) == (adversarial, one_hot, 10.0)
  assert factors.balance == factors.activation == factors.total_variation == factors.l2 == 0
  assert (config.dataset.name,
          config.dataset.num_classes) == (dataset, {'cifar10': 10, 'cifar100': 100}[dataset])


def test_a_rate_that_falls_over_the_run(monkeypatch):
  """By the steps of the generator: rounds times calls times steps of a call."""
  made = {}
  monkeypatch.setattr(synth, 'create', lambda name, **numbers: made.update(numbers))
  config = CONFIGS['default']('dfq')
  config.method.update(generator_schedule='cosine', num_steps=3)
  config.distill.update(rounds=7, calls_per_round=4)
  build_method.synthesizer(resolve(config).method, 1)(None)
  rates = [float(made['generator_lr'](step)) for step in (0, 42, 84)]
  assert rates == pytest.approx([3e-3, 1.5e-3, 0], abs=1e-9)


def test_idle_devices_are_told_of(capsys):
  config = toy_runs.config(num_devices=None)
  build.note_idle_devices(resolve(config), build.make_mesh(resolve(config)).size)
  printed = capsys.readouterr().err
  assert '1 of 4 devices are used, since method.num_tasks is 1: a multiple of 4' in printed
  config.num_devices = 1  # As was asked for.
  build.note_idle_devices(resolve(config), build.make_mesh(resolve(config)).size)
  config.num_devices, config.method.num_tasks = None, 8
  build.note_idle_devices(resolve(config), build.make_mesh(resolve(config)).size)
  assert capsys.readouterr().err == ''


def test_every_method_has_numbers_and_every_file_of_numbers_a_method():
  scales = {name: set(toy_runs.common.methods(scale)) for name, scale in (
      ('cifar10', 'cifar'), ('cifar100', 'cifar'), ('default', 'quickstart'))}
  assert set.union(*scales.values()) == set(synth.names()) - {'noise'}
  assert set.union(*scales.values()) == {path.stem
                                         for path in (toy_runs.ROOT / 'configs' / 'methods').glob(
                                             '*.py')}
  for name, methods in scales.items():
    assert methods <= set(arguments(name))
    for method in methods:
      assert CONFIGS[name](method).method.name == method


@pytest.mark.parametrize(('method', 'calls', 'temperature', 'divergence', 'factors',
                          'latent_dim'), [
    ('dafl', 80, 1.0, 'kl', dict(one_hot=1.0, balance=20.0, activation=1e-3), 512),
    ('zskt', 80, 1.0, 'kl', dict(adversarial=1.0), 256),
    ('dfad', 80, 1.0, 'l1', dict(adversarial=1.0), 256),
    ('dfq', 40, 1.0, 'kl', dict(batch_norm=1.0, one_hot=1.0, balance=20.0, adversarial=1.0), 256)])
def test_numbers_of_the_published_generators(method, calls, temperature, divergence, factors,
                                             latent_dim):
  config = CONFIGS['cifar10'](method)
  section = config.distill
  assert (section.rounds, section.calls_per_round, section.steps_per_round) == (200, calls, 400)
  assert (section.temperature, section.divergence,
          section.batch_size) == (temperature, divergence, 256)
  assert {name: factor for name, factor in config.factors.items() if factor} == factors
  assert (config.method.latent_dim, config.method.generator_lr) == (latent_dim, 1e-3)
  assert (config.optimizer.learning_rate, config.augment.student.name) == (0.1, 'none')


@pytest.mark.parametrize(('each', 'classes', 'decay', 'gamma'), [
    ('camvid:dfad,published', 11, 5e-4, 0.1), ('nyuv2:dfad', 13, 5e-5, 0.3)])
def test_numbers_of_the_published_segmentation(each, classes, decay, gamma):
  """DFAD's protocol (arXiv:1912.11006 and its code); rates fall after 100 and 200 rounds."""
  config = get(each)
  settings, section, optimizer = resolve(config), config.distill, config.optimizer
  assert config.dataset.num_classes == classes
  assert config.dataset.image_shape == (256, 341, 3)
  assert config.generator.image_shape == (128, 128, 3)
  assert (section.rounds, section.calls_per_round, section.steps_per_round) == (300, 50, 250)
  assert section.batch_size == config.method.batch_size == 64
  assert (section.temperature, section.divergence) == (1.0, 'l1')
  assert (optimizer.learning_rate, optimizer.momentum, optimizer.weight_decay) == (0.1, 0.9, decay)
  assert config.method.adversary.to_dict() == dict(
      divergence='log_l1', temperature=1.0, masked=False, train_mode=True)
  of_student = build.schedule(optimizer, section.rounds, section.steps_per_round)
  of_generator = build_method.generator_rate(settings.method)
  for rate, first, steps in ((of_student, 0.1, 250), (of_generator, 1e-3, 50)):
    for round_, falls in ((0, 0), (99, 0), (101, 1), (199, 1), (201, 2)):
      assert float(rate(round_ * steps)) == pytest.approx(first * gamma**falls, rel=1e-5)


@pytest.mark.parametrize(('dataset', 'pair', 'batch', 'rounds', 'temperature', 'divergence',
                          'threshold', 'last'), [
    ('cifar10', 'resnet34-resnet18', 512, 250, 20.0, 'l1', 12.0, 62.0),
    ('cifar10', 'wrn40_2-wrn16_1', 1024, 250, 20.0, 'kl', 12.0, 6.7),
    ('cifar100', 'resnet34-resnet18', 768, 400, 5.0, 'l1', 4.2, 83.7),
    ('cifar100', 'wrn40_2-wrn40_1', 1024, 500, 2.0, 'kl', 5.0, 32.9)])
def test_numbers_of_cu_dfkd(dataset, pair, batch, rounds, temperature, divergence, threshold, last):
  """The published scripts, with where their two dials end (arXiv:2208.13648)."""
  config = CONFIGS[dataset](f'cu_dfkd,{pair}')
  method, section = config.method, config.distill
  assert (section.batch_size, method.batch_size, section.rounds) == (batch, batch, rounds)
  assert (section.calls_per_round, section.steps_per_round,
          section.divergence) == (40, 400, divergence)
  assert section.temperature == method.balance_temperature == temperature
  steps = rounds * section.steps_per_round
  assert method.threshold_start + method.threshold_growth * steps == pytest.approx(threshold)
  factor = schedules.ramp(**method.adversarial.to_dict())
  assert float(factor(rounds * section.calls_per_round)) == pytest.approx(
      last, abs=0.06)  # As rounded there.


@pytest.mark.parametrize(('method', 'numbers', 'factors', 'student'), [
    ('cmi', dict(num_steps=200, generator_lr=1e-3, latent_lr=1e-3, latent_dim=256, adam_b1=0.5,
                 adam_b2=0.999,
                 meta='reinit', contrast_temperature=0.2, bank_size=40_960, num_negatives=4_096,
                 projection_size=256),
     dict(batch_norm=1.0, one_hot=1.0, adversarial=0.5, contrast=0.8),
     dict(temperature=20.0, steps_per_round=400)),
    ('deep_inversion', dict(num_steps=1000, learning_rate=0.1, adam_b1=0.5, adam_b2=0.99,
                            keep='best'),
     dict(batch_norm=10.0, one_hot=1.0, adversarial=1.0, total_variation=1e-3),
     dict(temperature=20.0, rounds=200)),
    ('cu_dfkd', dict(latent_dim=512, generator_lr=1e-3, adam_b1=0.9, adam_b2=0.99, init_std=0.02,
                     sample_by='running', curriculum_kind='log', per='sample', num_steps=1),
     dict(batch_norm=1.0, one_hot=1.0, balance=20.0, adversarial=1.0), dict(distill_after=0)),
    ('ssd_kd', dict(gamma=2.0, beta=0.5, draw='priority', label_source='random', counted='seen',
                    new_priority='max',
                    normalised_diversity=False, stop_modulation=False, num_steps=5),
     dict(batch_norm=10.0, one_hot=0.4, adversarial=1.1), dict(temperature=20.0, rounds=220)),
    *((name, dict(adam_b1=0.5, adam_b2=0.999, sample_by='running', batch_size=256,
                  num_steps=1), None,
       dict(temperature=1.0)) for name in ('dafl', 'zskt', 'dfq', 'dfad'))])
def test_numbers_of_the_methods(method, numbers, factors, student):
  """Of the specification's tables; SSD-KD's are partly guesses, which its file names."""
  for dataset in ('cifar10', 'cifar100'):
    config = CONFIGS[dataset](method)
    assert {name: config.method[name] for name in numbers} == numbers
    assert {name: config.distill[name] for name in student} == student
    if factors:
      assert {name: factor for name, factor in config.factors.items() if factor} == factors
    if method in ('dafl', 'zskt', 'dfq', 'dfad', 'cu_dfkd'):  # The large generator.
      assert config.generator.options.to_dict() == dict(width=64, stem_width=256)
    if method in ('deep_inversion', 'cu_dfkd'):
      divergence, temperature, masked = dict(deep_inversion=('js', 3.0, False),
                                             cu_dfkd=('kl', 3.0, True))[method]
      assert config.method.adversary.to_dict() == dict(divergence=divergence,
                                                       temperature=temperature, masked=masked)
  assert CONFIGS['cifar100']('dfq,resnet34-resnet18').optimizer.learning_rate == 0.05
  assert CONFIGS['cifar100']('dfq').optimizer.learning_rate == CONFIGS['cifar10'](
      'dfq').optimizer.learning_rate == 0.1


def test_ssd_kd_is_fast_dfkd_with_a_small_buffer_and_fewer_steps():
  ours, base = CONFIGS['cifar10']('ssd_kd'), CONFIGS['cifar10']('fast_dfkd')
  assert (ours.method.capacity, ours.distill.steps_per_round) == (5_000, 100)
  shared = set(base.method) - {'name', 'capacity'}
  assert {name: ours.method[name]
          for name in shared} == {name: base.method[name] for name in shared}
  assert ours.factors == base.factors


@pytest.mark.parametrize(('dataset', 'num_steps'), [('cifar10', 30), ('cifar100', 40)])
def test_numbers_of_nayer(dataset, num_steps):
  """Its published command line (2310.00258): 20 epochs of ten calls, then 100 of two calls."""
  config = CONFIGS[dataset]('nayer')
  method, section = config.method, config.distill
  assert (method.num_steps, method.batch_size, method.generator_lr,
          method.embeddings) == (num_steps, 400, 4e-3, None)
  assert section.distill_after * section.calls_per_round == 200 == method.adversarial_after
  assert (method.latent_dim, method.latent_lr, config.labels) == (1_000, 4e-3, 'stratified')
  assert (section.rounds - section.distill_after, section.calls_per_round,
          method.redraw_every) == (100, 2, 20)
  assert (section.batch_size, config.optimizer.learning_rate) == (512, 0.2)
  assert (config.factors.batch_norm, config.factors.one_hot,
          config.factors.adversarial) == (10.0, 0.5, 1.33)
  # Nothing is ever dropped.
  assert method.capacity == 400 * section.rounds * section.calls_per_round


def test_numbers_that_all_pairs_share():
  config = CONFIGS['cifar10']()
  method, section, optimizer = config.method, config.distill, config.optimizer
  assert (method.meta, method.moments_momentum, method.latent_dim,
          method.batch_size) == ('fomaml', 0.9, 256, 256)
  assert (method.adam_b1, method.adam_b2, method.reptile_scale,
          method.keep) == (0.5, 0.999, 67, 'best')
  assert method.capacity == 56_320 == section.rounds * method.batch_size  # Nothing is ever dropped.
  assert (section.rounds, section.distill_after, section.steps_per_round) == (220, 20, 400)
  assert (section.batch_size, section.temperature, section.divergence) == (256, 20, 'kl')
  assert method.adversarial_after == 19  # One call before distillation begins.
  assert method.reset_after == 139
  assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ('sgd', 0.2, 1e-4)
  assert (optimizer.momentum, optimizer.nesterov) == (0.9, False)
  for of in (config.augment.synthesis, config.augment.student):
    assert (of.name, of.pad) == ('crop_and_flip', None)  # The published 4 pixels are the default.
  assert inspect.signature(augment.create(**resolve(config).augment).func).parameters[
      'pad'].default == 4
  assert config.teacher.mean == config.student.mean == (0.4914, 0.4822, 0.4465)
  assert config.teacher.std == (0.2023, 0.1994, 0.2010)
  assert CONFIGS['cifar100']().teacher.mean == (0.5071, 0.4867, 0.4408)
  assert CONFIGS['cifar100']().student.std == (0.2675, 0.2565, 0.2761)
  assert config.seed == 0


def test_published_learning_rates():
  """In epoch j of distillation: 2e-4 + (0.2 - 2e-4) (1 + cos(pi j / 200)) / 2."""
  config = CONFIGS['cifar10']()
  section = config.distill
  rate = build.schedule(config.optimizer, section.rounds - section.distill_after,
                                  section.steps_per_round)
  for epoch, wanted in ((0, 0.2), (1, 0.199988), (100, 0.1001), (119, 0.070725), (199, 2.1232e-4)):
    for step in (0, 399):
      assert float(rate(400 * epoch + step)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(('job', 'batch_size', 'gamma', 'label_factor', 'teacher_factor'), [
    ('scratch', 256, 0.2, 1.0, 0.0), ('kd', 128, 0.1, 0.1, 1.0)])
def test_numbers_of_the_published_baselines(job, batch_size, gamma, label_factor, teacher_factor):
  config = CONFIGS['cifar10'](f'{job},resnet34-resnet18')
  train_section, optimizer = config.train, config.optimizer
  assert (config.job, train_section.network,
          config.student.name) == ('train', 'student', 'resnet18')
  assert (train_section.epochs, train_section.batch_size,
          train_section.temperature) == (200, batch_size, 1.0)
  assert (train_section.label_factor,
          train_section.teacher_factor) == (label_factor, teacher_factor)
  assert (optimizer.learning_rate, optimizer.momentum, optimizer.weight_decay) == (0.1, 0.9, 1e-4)
  rate = build.schedule(optimizer, 200, 10)
  for epoch, times in ((0, 0), (119, 0), (120, 1), (149, 1), (150, 2), (180, 3), (199, 3)):
    assert float(rate(10 * epoch + 9)) == pytest.approx(0.1 * gamma**times)


@pytest.mark.parametrize('name', TRAINING)
def test_teachers_are_trained_on_the_training_images(name):
  config = CONFIGS[name]()
  assert (config.job, config.train.network) == ('train', 'teacher')
  assert (config.dataset.train_split, config.dataset.test_split) == ('train', 'test')
  assert config.train.teacher_factor == 0


def test_settings_of_the_embedded_teacher_are_chosen_without_test_images():
  section = CONFIGS['teacher_fashion_mnist']('validate').dataset
  assert 'test' not in section.train_split + section.test_split
  assert (section.train_split, section.test_split) == ('train[:55000]', 'train[55000:]')


@pytest.mark.parametrize('student', ['resnet20', 'wrn16_1'])
def test_a_teacher_that_nobody_here_trained(student):
  config = CONFIGS['cifar10_resnet56'](student)
  assert (config.teacher.name, config.teacher.options.shortcut,
          config.student.name) == ('resnet56', 'pad', student)
  assert config.teacher.mean == (0.485, 0.456, 0.406)
  assert config.teacher.std == (0.229, 0.224, 0.225)
  assert config.teacher.source is None
  assert num_params(config, 'teacher') == 853_018


def test_the_embedded_quick_start_is_complete():
  full, smoke = CONFIGS['default'](), CONFIGS['default']('smoke')
  assert full.teacher.source.startswith('embedded:')
  assert smoke.distill.rounds < full.distill.rounds
  assert 4 * num_params(full, 'student') <= num_params(full, 'teacher')


def test_arguments_come_in_any_order_and_exclude_each_other():
  assert CONFIGS['cifar10']('fast2,vgg11-resnet18') == CONFIGS['cifar10'](
      'vgg11-resnet18,fast_dfkd,fast2')
  with pytest.raises(ValueError, match="'fast2' and 'fast5' exclude each other"):
    CONFIGS['cifar10']('fast2,fast5')
  with pytest.raises(ValueError, match="'scratch' and 'published' exclude each other"):
    CONFIGS['camvid']('scratch,published')
  with pytest.raises(ValueError, match=r"Unknown config argument 'fast50'\. Did you mean 'fast5'"):
    CONFIGS['cifar10']('fast50')


def shrunk(each):
  """A config with everything small, but its kinds of things kept."""
  config = get(each)
  config.unlock()
  config.num_devices = 1
  config.dataset.update(
      name='toy', data_dir=toy_runs.data_dir(), image_shape=toy_runs.IMAGE,
      num_classes=toy_runs.CLASSES, test_split='test')
  for which, widths in toy_runs.NETWORKS.items():
    config[which].name, config[which].options = 'convnet', widths
    config[which].update(mean=(0.4,), std=(0.3,), bgr=False)
  config.teacher.source = None
  config.generator.options = dict(width=2) if config.generator.name == 'generator' else dict(
      widths=(3, 2, 2))
  config.dataset.crop = None
  if config.job == 'distill':
    small = dict(num_steps=2, batch_size=4, capacity=8, latent_dim=3, bank_size=6, num_negatives=3,
                 projection_size=5)
    config.method.update({name: number for name, number in small.items() if name in config.method})
    calls = min(config.distill.calls_per_round, 2)
    config.distill.update(rounds=1, distill_after=0, steps_per_round=2, calls_per_round=calls,
                          batch_size=4)
  config.train.update(epochs=1, batch_size=4)
  config.evaluate.batch_size = 23
  config.preflight.batch_size = 4
  config.compilation_cache = str(toy_runs.folder() / 'programs')
  return config


def with_teacher(config, tmp_path):
  network = build.fresh_network(resolve(config).teacher, jax.random.key(3))
  weights.save_safetensors(
      tmp_path / 'weights.safetensors',
      {'params': network.params, 'batch_stats': toy_runs.moved(network.batch_stats)})
  config.teacher.source = str(tmp_path / 'weights.safetensors')
  return config


@pytest.mark.exhaustive
def test_a_prior_and_an_averaged_generator_from_end_to_end(tmp_path):
  """Whoever reads the results is told of what came from elsewhere."""
  config = with_teacher(shrunk('default:nayer'), tmp_path)
  np.save(tmp_path / 'words.npy',
          np.random.default_rng(0).normal(size=(config.dataset.num_classes, 7)))
  config.method.update(embeddings=str(tmp_path / 'words.npy'), ema_decay=0.9, redraw_every=2)
  with toy_runs.quick():
    summary = train.run(config, tmp_path / 'run')
  assert summary['external_prior'] == str(tmp_path / 'words.npy')
  assert toy_runs.metrics(tmp_path / 'run')[0]['loss'] > 0


@pytest.mark.parametrize('each', [
    'default:smoke', 'cifar10:cu_dfkd', 'cifar100:kd',
    *(pytest.param(each, marks=pytest.mark.exhaustive) for each in (
        'default:ssd_kd', 'imagenet:small', 'cifar10:fast2', 'cifar10:deep_inversion',
        'cifar10:cmi', 'cifar10:zskt', 'cifar10:dfad', 'cifar10:scratch', 'cifar10_resnet56:',
        'teacher_cifar100:', 'teacher_fashion_mnist:'))])
def test_runs_from_end_to_end(each, tmp_path):
  config = with_teacher(shrunk(each), tmp_path)
  with toy_runs.quick():
    summary = train.run(config, tmp_path / 'run')
  assert summary['student']['last']['round'] == 1
  lines = toy_runs.metrics(tmp_path / 'run')
  assert len(lines) == 1
  assert {'loss', 'top1'} <= set(lines[0])
  assert ('control' in summary) == (config.job == 'distill')
  assert bool(summary.get('control')) == (config.job == 'distill' and config.control)
