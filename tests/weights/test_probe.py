"""The self-check of imported weights: each thing that can be wrong with them is found."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import linen as nn
from safetensors import numpy as safetensors_numpy

from dfkd_jax import models, weights
from dfkd_jax.weights.probe import probe_images

IMAGE = toys.IMAGE


def changed(path, change):
  """The teacher with one of its variables changed."""
  network = toys.teacher()

  def visit(keys, leaf):
    is_wanted = jax.tree_util.keystr(keys, simple=True, separator='/') == path
    return jnp.asarray(change(np.array(leaf))) if is_wanted else leaf

  tree = {'params': network.params, 'batch_stats': network.batch_stats}
  return network.replace(**jax.tree_util.tree_map_with_path(visit, tree))


def with_value(value):
  def change(array):
    array.flat[1] = value
    return array
  return change


def test_probe_images_are_the_same_everywhere():
  images = probe_images(3, (9, 6, 2))
  assert images.shape == (3, 9, 6, 2)
  assert images.dtype == np.float32
  patches = np.random.RandomState(3).randint(0, 256, (3, 3, 2, 2))
  np.testing.assert_array_equal(np.rint(images * 255)[1, 8, 5], patches[1, 2, 1])
  np.testing.assert_array_equal(np.rint(images * 255)[:, 3:5, 4], patches[:, :2, 1])
  assert 0 <= images.min() < images.max() <= 1


def test_sound_weights_pass():
  report = weights.check_network(toys.teacher(), IMAGE)
  moments = toys.teacher().running().values()
  variances = np.concatenate([np.asarray(norm.var) for norm in moments])
  logits = np.asarray(toys.teacher()(jnp.asarray(probe_images(0, IMAGE))).logits)
  assert report == {
      'min_variance': float(variances.min()), 'zero_variances': 0, 'probe_difference': None,
      'logits_std': pytest.approx(logits.std(), rel=1e-4)}
  assert json.loads(json.dumps(report)) == report
  plain = toys.teacher_without_batch_norm()
  assert weights.check_network(plain, IMAGE)['min_variance'] is None
  assert weights.check_network(toys.dense_teacher(), IMAGE)['zero_variances'] == 0
  with_zero = changed('batch_stats/bn1/var', with_value(0))
  assert weights.check_network(with_zero, IMAGE)['zero_variances'] == 1


@pytest.mark.parametrize(('network', 'message'), [
    (lambda: changed('params/fc/kernel', with_value(np.nan)),
     'params/fc/kernel holds 1 values that are not finite'),
    (lambda: changed('batch_stats/bn2/mean', with_value(np.inf)),
     'batch_stats/bn2/mean holds 1 values that are not'),
    (lambda: changed('batch_stats/bn1/var', with_value(-0.5)),
     'bn1/var holds 1 negative variances, down to -0.5'),
    (lambda: models.create_network(toys.teacher().module, jax.random.key(0), IMAGE),
     'The running moments of all 2 batch norms are 0 and 1, as before any training'),
    (lambda: changed('params/fc/kernel', lambda kernel: 0 * kernel),
     'The logits are the same for 3 different images'),
    (lambda: changed('params/fc/kernel', lambda kernel: np.sign(kernel) * np.float32(3e38)),
     'logits of the probe are not finite'),
    (lambda: toys.teacher().replace(module=Wrong(5)),
     r'The logits .* the shape \(3,\), must be \(3, \.\.\., 5\)'),
    (lambda: toys.teacher().replace(module=Wrong(7, (1, 2))),
     r'the shape \(3, 3\), must be \(3, \.\.\., 7\)')])
def test_each_fault_of_weights_is_found(network, message):
  with pytest.raises(ValueError, match=rf'^[^\n]*{message}[^\n]*$'):
    weights.check_network(network(), IMAGE)


class Wrong(nn.Module):
  """One number for an image, or one for each of its channels."""

  num_classes: int
  over: tuple[int, ...] = (1, 2, 3)

  def __call__(self, images):
    return images.mean(self.over)


def variables():
  network = toys.teacher()
  return {'params': network.params, 'batch_stats': network.batch_stats}


@pytest.fixture
def probed(tmp_path):
  """The teacher's weights in a file with its probe."""
  probe = weights.make_probe(toys.teacher(), IMAGE, seed=5)
  weights.save_safetensors(tmp_path / 'w', variables(), {'network': 'text', 'a': 'b'}, probe=probe)
  return tmp_path / 'w'


def load(path):
  module = toys.teacher().module
  return models.bind(module, weights.load(path, module, IMAGE), mean=toys.MEAN, std=toys.STD)


def test_a_file_carries_its_probe(probed):
  assert weights.read_metadata(probed)['network'] == 'text'
  probe = weights.read_probe(probed)
  assert (probe.seed, probe.image_shape) == (5, IMAGE)
  logits = np.asarray(toys.teacher()(jnp.asarray(probe_images(5, IMAGE))).logits)
  np.testing.assert_allclose(probe.logits, logits, rtol=1e-4, atol=1e-5)
  assert probe.tolerance == pytest.approx(0.02 * logits.std(), rel=0.01)
  assert weights.check_network(load(probed), IMAGE, probe)['probe_difference'] < 1e-4


def test_half_precision_is_within_the_tolerance(tmp_path):
  probe = weights.make_probe(toys.teacher(), IMAGE)
  weights.save_safetensors(tmp_path / 'w', variables(), dtype='float16', probe=probe)
  report = weights.check_network(load(tmp_path / 'w'), IMAGE, weights.read_probe(tmp_path / 'w'))
  assert report['probe_difference'] > 0


@pytest.mark.parametrize('change', [
    {'mean': (0.0,), 'std': (1.0,)}, {'mean': toys.MEAN[::-1], 'std': toys.STD[::-1]},
    {'params': None}])
def test_another_preprocessing_or_network_is_told_by_the_probe(change, probed):
  if 'params' in change:
    change = {'params': toys.nudged(toys.nudged(toys.nudged(toys.teacher().params)))}
  with pytest.raises(ValueError, match=r'^The logits of the probe are off by [^\n]*preprocessing'):
    weights.check_network(toys.teacher().replace(**change), IMAGE, weights.read_probe(probed))


def test_a_probe_of_other_images_is_ignored_and_of_other_classes_refused(probed):
  probe = weights.read_probe(probed)
  other = probe._replace(image_shape=(8, 8, 3))
  assert weights.check_network(toys.teacher(), IMAGE, other)['probe_difference'] is None
  other = probe._replace(logits=tuple(row[:4] for row in probe.logits))
  with pytest.raises(ValueError, match=r'logits of the shape \(3, 4\), the network \(3, 5\)'):
    weights.check_network(toys.teacher(), IMAGE, other)


def test_files_without_a_probe(tmp_path):
  (tmp_path / 'plain').write_bytes(safetensors_numpy.save({'a': np.ones(3)}))
  (tmp_path / 'other').write_bytes(b'PK\x03\x04')
  for name in ('plain', 'other', '.', 'plain#ema'):
    assert weights.read_probe(f'{tmp_path}/{name}') is None


@pytest.mark.parametrize('text', ['', '{}', '[1]', '{"seed": 1}', '\x1b[2J', 'another probe'])
def test_damaged_probes_are_refused(text, tmp_path):
  data = safetensors_numpy.save({'a': np.ones(3)}, metadata={'probe': text})
  (tmp_path / 'w').write_bytes(data)
  with pytest.raises(ValueError, match=r'^The probe in [^\n]*w is damaged: [^\n]*$') as error:
    weights.read_probe(tmp_path / 'w')
  assert str(error.value).isprintable()
