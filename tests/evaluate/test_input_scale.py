"""A wrong mean or std of a teacher is noticed, and a right one is not."""

import ast
import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs
import toys
from conftest import SHARED, shared_loader
from flax import linen as nn

from configs import cifar10_resnet56
from dfkd_jax import models, train, weights
from dfkd_jax.config import build
from dfkd_jax.config.records import resolve
from dfkd_jax.evaluate import input_scale
from dfkd_jax.evaluate.input_scale import Scale
from dfkd_jax.types import Moments

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
BYTE = 1 / 255
SHAPE = (13, 9, 3)


@pytest.fixture(scope='module', autouse=True)
def quick():
  with toy_runs.quick():
    yield


def photos(number=24, shape=SHAPE):
  """Smooth images, unlike the drawn ones: a few waves of colour each."""
  draw = np.random.default_rng(1)
  rows, columns = np.meshgrid(*map(np.arange, shape[:2]), indexing='ij')
  waves = draw.uniform(-0.6, 0.6, (2, number, 1, 1, shape[2]))
  phases = draw.uniform(0, 6, (number, 1, 1, shape[2]))
  angles = waves[0] * rows[..., None] + waves[1] * columns[..., None] + phases
  levels = draw.uniform(0.3, 0.6, (number, 1, 1, 1))
  return np.clip(levels + 0.3 * np.sin(angles), 0, 1).astype(np.float32)


def trained(module, images, mean=MEAN, std=STD):
  """A network whose running moments are those of the images."""
  network = models.create_network(module, jax.random.key(0), images.shape[1:], mean=mean, std=std)
  moments = network(images).moments
  stats = dict(network.batch_stats)
  for path, (batch_mean, batch_var) in moments.items():
    node = stats
    for name in path.split('/')[:-1]:
      node = node[name]
    node[path.split('/')[-1]] = {'mean': batch_mean, 'var': batch_var}
  return network.replace(batch_stats=stats)


@pytest.fixture(scope='module')
def teacher():
  return trained(models.ConvNet(5, widths=(6, 4), strides=(1, 2)), photos())


WRONG = {
    'std without its factor': (MEAN, tuple(255 * value for value in STD)),
    'std divided twice': (MEAN, tuple(value / 255 for value in STD)),
    'bytes': (tuple(255 * value for value in MEAN), tuple(255 * value for value in STD)),
    'mean of bytes': (tuple(255 * value for value in MEAN), STD),
    'none': ((0.0,), (1.0,)),
    '0..255': ((0.0,), (BYTE,)),
}


def check(network, images):
  return input_scale.check(network, images, 16, SHAPE)


@pytest.mark.parametrize('kind', [np.float32, np.uint8])
def test_the_right_scale_is_silent(teacher, kind):
  images = photos() if kind == np.float32 else np.rint(255 * photos()).astype(kind)
  assert check(teacher, images) is None
  assert check(teacher, None) is None


@pytest.mark.parametrize('name', WRONG)
@pytest.mark.parametrize('is_real', [True, False])
def test_a_wrong_scale_is_noted_with_one_that_fits(teacher, name, is_real):
  mean, std = WRONG[name]
  note = check(teacher.replace(mean=mean, std=std), photos() if is_real else None)
  assert "batch norm 'bn1'" in note
  assert ('drawn images' in note) != is_real
  value = lambda flag: note.partition(f"--config.teacher.{flag}='")[2].partition("'")[0]
  values = {flag: ast.literal_eval(value(flag)) for flag in ('mean', 'std')}
  repaired = teacher.replace(**values)
  assert check(repaired, photos() if is_real else None) is None
  if name in ('std without its factor', 'std divided twice', 'bytes', 'mean of bytes'):
    np.testing.assert_allclose(values['std'], STD, rtol=1e-3)
    np.testing.assert_allclose(values['mean'], MEAN, rtol=1e-3)


def test_it_measures_the_input_under_another_scale(teacher):
  images, scale = photos(), Scale('other', (0.1, 0.2, 0.3), (2.0,))
  module, variables = nn.Conv(6, (3, 3), padding=1, use_bias=False), teacher.params['conv1']
  x = (images - np.float32(scale.mean)) / 2
  expected = module.apply({'params': variables}, x).reshape(-1, 6)
  found = input_scale.measure(teacher, images, 'bn1', scale)
  np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(found.var, expected.var(0), rtol=1e-3)


def test_distance_is_the_median_divergence():
  moments = Moments(np.array([1.0, 5.0, 0.0]), np.array([4.0, 2.0, 1.0]))
  running = Moments(np.array([2.0, 5.0, 0.0]), np.array([1.0, 2.0, 100.0]))
  # Of the channels: (5 / 1 + 2 / 4) / 2 - 1, none, and (1 / 100 + 100 / 1) / 2 - 1.
  assert input_scale.distance(moments, running) == pytest.approx(1.75)
  scaled = [Moments(-3 * mean, 9 * var) for mean, var in (moments, running)]
  assert input_scale.distance(*scaled) == pytest.approx(1.75)
  assert input_scale.distance(running, running) == 0


def test_channels_without_variance_are_left_out():
  running = Moments(np.zeros(4), np.array([0.0, 0.0, 0.0, 2.0]))
  moments = Moments(np.full(4, 7.0), np.array([0.0, 1.0, 0.0, 2.0]))
  assert input_scale.distance(moments, running) == pytest.approx(49 / 2)
  nothing = Moments(np.zeros(4), np.zeros(4))
  assert input_scale.distance(moments, nothing) == 0
  constant = Moments(np.zeros(1), np.zeros(1))
  assert 1e9 < input_scale.distance(constant, Moments(np.zeros(1), np.ones(1))) < np.inf


class Late(nn.Module):
  """Two branches; by name, the first batch norm comes last, and both come after pooling."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    norm = lambda name: nn.BatchNorm(use_running_average=not train, name=name)
    first = norm('z')(x.mean((1, 2)))
    second = norm('a')(nn.Dense(4)(nn.max_pool(x, (2, 2), (2, 2))).mean((1, 2)))
    return nn.Dense(5)(jnp.concatenate([first, second], -1))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.BatchNorm(use_running_average=True, name='bn')(nn.Dense(3)(x)), None


class Stacked(nn.Module):
  @nn.compact
  def __call__(self, x):
    blocks = nn.scan(Block, length=2, split_rngs={'params': True},
                     variable_axes={'params': 0, 'batch_stats': 0, 'intermediates': 0})
    return nn.Dense(5)(blocks(name='blocks')(x, None)[0].mean((1, 2)))


def test_the_first_batch_norm_is_the_first_to_run():
  images = photos()
  network = trained(Late(), images)
  for _ in range(2):  # JAX keeps traces.
    assert input_scale.find_first_batch_norm(network, images) == 'z'
  assert check(network, images) is None
  assert check(network.replace(std=(255.0,)), images).startswith("the input of batch norm 'z'")
  stacked = models.create_network(Stacked(), jax.random.key(0), SHAPE)
  assert input_scale.find_first_batch_norm(stacked, images) == 'blocks/bn/0'


def test_networks_without_batch_norm_get_no_note():
  network = models.create_network(toys.Plain(), jax.random.key(0), SHAPE, std=(BYTE,))
  assert input_scale.find_first_batch_norm(network, photos()) is None
  assert check(network, photos()) is None
  assert check(network, None) is None


@pytest.mark.parametrize('shape', [(45, 64, 3), (28, 28, 1), (23, 17, 2)])
def test_drawn_images_are_like_photos(shape):
  images = input_scale.draw_images(20, shape)
  assert images.shape == (20, *shape)
  assert images.dtype == np.float32
  assert images.min() >= 0
  assert images.max() <= 1
  assert images.mean() == pytest.approx(0.45, abs=0.05)
  assert images.std() == pytest.approx(0.25, abs=0.04)
  # Neighbours differ less than the same pixels of two images.
  assert np.abs(np.diff(images, axis=1)).mean() < 0.6 * np.abs(images - images[::-1]).mean()


def run_check(tmp_path, **changes):
  printed = io.StringIO()
  with contextlib.redirect_stderr(printed):
    found = train.run(toy_runs.config(job='check', **changes), str(tmp_path / 'run'))
  return found['notes'], printed.getvalue()


def grey_teacher(tmp_path):
  """Weights that belong to the data set 'grey'."""
  settings = resolve(toy_runs.config(dataset__name='grey'))
  split = build.load_split(settings.dataset, settings.task, 'train')
  images = split.images.astype(np.float32) / 255
  network = trained(build.module(settings.teacher), images, (0.4,), (0.3,))
  path = tmp_path / 'grey.safetensors'
  weights.save_safetensors(path, {'params': network.params, 'batch_stats': network.batch_stats})
  return str(path)


@pytest.mark.parametrize(('name', 'size'), [
    ('grey', 40), ('missing', 6), pytest.param('grey', 6, marks=pytest.mark.exhaustive),
    pytest.param(None, 6, marks=pytest.mark.exhaustive)])
def test_the_preflight_returns_and_prints_the_note(tmp_path, name, size):
  """With more images than the data set has, or without any, too."""
  about = dict(dataset__name=name, teacher__source=grey_teacher(tmp_path),
               preflight__batch_size=size)
  notes, _ = run_check(tmp_path, **about)
  assert not [note for note in notes if 'mean and std' in note]
  notes, printed = run_check(
      tmp_path, **about, teacher__mean=(0.4 * 255,), teacher__std=(0.3 * 255,))
  note, = (note for note in notes if 'mean and std' in note)
  assert f'note: {note}' in printed
  assert ('drawn images' in note) == (name != 'grey')
  assert "--config.teacher.mean='(0.4,)' --config.teacher.std='(0.3,)'" in note


@pytest.mark.exhaustive
def test_a_run_compares_with_its_test_images(tmp_path):
  summary = train.run(
      toy_runs.config(dataset__name='grey', teacher__source=grey_teacher(tmp_path),
                      teacher__std=(0.3 / 255,), distill__rounds=2, preflight__enabled=True),
      tmp_path / 'run')
  note, = (note for note in summary['preflight']['notes'] if 'mean and std' in note)
  assert 'drawn images' not in note
  assert "--config.teacher.std='(0.3,)'" in note


def test_a_refused_teacher_gets_the_note_as_a_reason(tmp_path):
  """A std that is far too large leaves the same input of all images."""
  printed = io.StringIO()
  source = grey_teacher(tmp_path)
  with contextlib.redirect_stderr(printed), pytest.raises(ValueError, match='predicts the same'):
    train.run(toy_runs.config(job='check', dataset__name='grey', teacher__source=source,
                              teacher__std=(1e7,)), str(tmp_path / 'run'))
  assert 'mean and std of the teacher look wrong' in printed.getvalue()


def test_a_public_teacher():
  path = SHARED / 'teachers' / 'resnet56_cifar10.th'
  if not path.exists():
    pytest.skip('The public ResNet-56 is not at hand.')
  images = shared_loader().cifar10_test()[0]
  config = cifar10_resnet56.get_config()
  config.teacher.source = str(path)
  network = build.trained_network(resolve(config).teacher)
  for real in (images, None):
    assert input_scale.check(network, real, 32, (32, 32, 3)) is None
    for mean, std in (((0.0,), (BYTE,)), ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4))):
      note = input_scale.check(network.replace(mean=mean, std=std), real, 32, (32, 32, 3))
      assert 'would fit' in note
      assert "teacher.mean='(0.485" in note
