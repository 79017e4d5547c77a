"""The card of a network, and the self-check: each thing that can be wrong with imported weights is found."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import linen as nn
from safetensors import numpy as safetensors_numpy

from dfkd_jax import models, weights
from dfkd_jax.weights import card

IMAGE = toys.IMAGE


def changed(path, change):
  """The teacher with one of its variables changed."""
  network = toys.teacher()

  def visit(keys, leaf):
    here = jax.tree_util.keystr(keys, simple=True, separator='/') == path
    return jnp.asarray(change(np.array(leaf))) if here else leaf

  tree = {'params': network.params, 'batch_stats': network.batch_stats}
  return network.replace(**jax.tree_util.tree_map_with_path(visit, tree))


def with_value(value):
  def change(array):
    array.flat[1] = value
    return array
  return change


def test_the_card_says_what_the_network_is(tmp_path):
  (tmp_path / 'w').write_bytes(b'some weights')
  found = weights.describe(toys.teacher(), tmp_path / 'w')
  sizes = {3 * 3 * 3 * 3, 3 * 3 * 3 * 6, 2 * (3 + 6), 6 * 5 + 5}
  assert found == weights.Card(
      source=str(tmp_path / 'w'), sha256=hashlib.sha256(b'some weights').hexdigest(), num_classes=5,
      num_params=sum(sizes), batch_norms=2, channels=9, dtype='float32', mean=toys.MEAN, std=toys.STD, bgr=False,
      resize=None)
  assert json.loads(json.dumps(found._asdict()))['mean'] == list(toys.MEAN)
  assert found.lines() == [
      f'weights     {tmp_path / "w"} (SHA-256 {found.sha256[:16]})',
      'network     296 parameters in float32, 5 classes', 'batch norm  2 layers with 9 channels',
      'images      mean (0.5, 0.4, 0.3), std (0.25, 0.2, 0.3)']
  other = found._replace(mean=(0.25,), std=(1 / 3,), bgr=True, resize=(8, 6))
  assert other.lines()[-1] == 'images      BGR, mean (0.25), std (0.3333), resized to (8, 6)'


def test_the_card_names_a_source_that_is_no_path(tmp_path):
  (tmp_path / 'w').write_bytes(b'some weights')
  found = weights.describe(toys.teacher_without_batch_norm(), 'embedded:w', f'{tmp_path / "w"}#ema')
  assert found.source == 'embedded:w'
  assert found.sha256 == hashlib.sha256(b'some weights').hexdigest()
  assert (found.batch_norms, found.channels, found.num_classes) == (0, 0, None)


MODEL = json.dumps({'weightsManifest': [{'paths': ['b.bin', 'sub/a.bin'], 'weights': []}]}).encode()
SHARDED = {'model.json': MODEL, 'b.bin': b'12', 'sub/a.bin': b'34'}


def written(folder, files):
  for name, data in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  return folder


def test_the_digest_of_a_folder_changes_with_any_name_and_content(tmp_path):
  folders = iter(range(9))
  digest = lambda files: card.digest(written(tmp_path / str(next(folders)), files))
  same = {'_METADATA': b'{}', 'd/b': b'12'}
  assert digest(same) == digest(dict(reversed(same.items())))
  others = [same | {'d/b': b'13'}, {'_METADATA': b'{}', 'd/c': b'12'}, same | {'c': b''}, same | {'model.json': b'{}'}]
  assert len({digest(files) for files in [same, *others]}) == 5


def test_the_digest_of_a_model_covers_its_json_and_the_shards_that_it_names(tmp_path):
  """By hand: as sha256sum lists them, in order of their names."""
  folder = written(tmp_path / 'model', SHARDED)
  names = 'b.bin', 'model.json', 'sub/a.bin'
  lines = ''.join(f'{hashlib.sha256(SHARDED[name]).hexdigest()}  {name}\n' for name in names)
  before = hashlib.sha256(lines.encode()).hexdigest()
  assert card.digest(folder) == card.digest(folder / 'model.json') == before
  written(folder, {'other.bin': b'56', 'sub/b.bin': b'12', 'model.safetensors': b'78', 'film/long.mp4': b'9'})
  assert card.digest(folder) == card.digest(folder / 'model.json') == before
  for name, data in {'b.bin': b'13', 'sub/a.bin': b'3', 'model.json': MODEL + b' '}.items():
    written(folder, {name: data})
    assert card.digest(folder) == card.digest(folder / 'model.json') != before
    written(folder, {name: SHARDED[name]})
  assert card.digest(folder) == before


def test_the_digest_of_a_model_without_a_shard_is_refused(tmp_path):
  folder = written(tmp_path / 'model', SHARDED)
  (folder / 'b.bin').unlink()
  for path in (folder, folder / 'model.json'):
    with pytest.raises(ValueError, match=rf'^Refused to read {path}: it lacks its file b\.bin\.$'):
      card.digest(path)


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_the_digest_of_a_folder_of_the_hub_covers_its_weights(name, tmp_path):
  folder = written(tmp_path / 'net', {name: b'12', 'README.md': b'a'})
  before = card.digest(folder)
  assert before == hashlib.sha256(f'{hashlib.sha256(b"12").hexdigest()}  {name}\n'.encode()).hexdigest()
  assert card.digest(written(folder, {'README.md': b'b', 'more': b''})) == before
  assert card.digest(written(folder, {name: b'13'})) != before


def test_probe_images_are_the_same_everywhere():
  images = card.probe_images(3, (9, 6, 2))
  assert images.shape == (3, 9, 6, 2)
  assert images.dtype == np.float32
  patches = np.random.RandomState(3).randint(0, 256, (3, 3, 2, 2))
  np.testing.assert_array_equal(np.rint(images * 255)[1, 8, 5], patches[1, 2, 1])
  np.testing.assert_array_equal(np.rint(images * 255)[:, 3:5, 4], patches[:, :2, 1])
  assert 0 <= images.min() < images.max() <= 1


def test_sound_weights_pass():
  found = weights.check(toys.teacher(), IMAGE)
  variances = np.concatenate([np.asarray(of.var) for of in toys.teacher().running().values()])
  logits = np.asarray(toys.teacher()(jnp.asarray(card.probe_images(0, IMAGE))).logits)
  assert found == {'min_variance': float(variances.min()), 'zero_variances': 0, 'probe_difference': None,
                   'logits_std': pytest.approx(logits.std(), rel=1e-4)}
  assert json.loads(json.dumps(found)) == found
  assert weights.check(toys.teacher_without_batch_norm(), IMAGE)['min_variance'] is None
  assert weights.check(toys.dense_teacher(), IMAGE)['zero_variances'] == 0
  assert weights.check(changed('batch_stats/bn1/var', with_value(0)), IMAGE)['zero_variances'] == 1


@pytest.mark.parametrize(('network', 'message'), [
    (lambda: changed('params/fc/kernel', with_value(np.nan)), 'params/fc/kernel holds 1 values that are not finite'),
    (lambda: changed('batch_stats/bn2/mean', with_value(np.inf)), 'batch_stats/bn2/mean holds 1 values that are not'),
    (lambda: changed('batch_stats/bn1/var', with_value(-0.5)), 'bn1/var holds 1 negative variances, down to -0.5'),
    (lambda: models.create_network(toys.teacher().module, jax.random.key(0), IMAGE),
     'The running moments of all 2 batch norms are 0 and 1, as before any training'),
    (lambda: changed('params/fc/kernel', lambda kernel: 0 * kernel), 'The logits are the same for 3 different images'),
    (lambda: changed('params/fc/kernel', lambda kernel: np.sign(kernel) * np.float32(3e38)),
     'logits of the probe are not finite'),
    (lambda: toys.teacher().replace(module=Wrong(5)), r'The logits .* the shape \(3,\), must be \(3, \.\.\., 5\)'),
    (lambda: toys.teacher().replace(module=Wrong(7, (1, 2))), r'the shape \(3, 3\), must be \(3, \.\.\., 7\)')])
def test_what_is_wrong_with_weights_is_found(network, message):
  with pytest.raises(ValueError, match=rf'^[^\n]*{message}[^\n]*$'):
    weights.check(network(), IMAGE)


class Wrong(nn.Module):
  """One number for an image, or one for each of its channels."""

  num_classes: int
  over: tuple[int, ...] = (1, 2, 3)

  def __call__(self, images):
    return images.mean(self.over)


@pytest.fixture
def probed(tmp_path):
  """The teacher's weights in a file with its probe."""
  network = toys.teacher()
  variables = {'params': network.params, 'batch_stats': network.batch_stats}
  weights.save_safetensors(
      tmp_path / 'w', variables, {'network': 'text', 'a': 'b'}, probe=weights.make_probe(network, IMAGE, seed=5))
  return tmp_path / 'w'


def test_a_file_carries_its_probe(probed):
  assert weights.read_metadata(probed)['network'] == 'text'
  probe = weights.stored_probe(probed)
  assert (probe.seed, probe.image_shape) == (5, IMAGE)
  logits = np.asarray(toys.teacher()(jnp.asarray(card.probe_images(5, IMAGE))).logits)
  np.testing.assert_allclose(probe.logits, logits, rtol=1e-4, atol=1e-5)
  assert probe.tolerance == pytest.approx(0.02 * logits.std(), rel=0.01)
  network = models.bind(toys.teacher().module, weights.load(probed, toys.teacher().module, IMAGE),
                        mean=toys.MEAN, std=toys.STD)
  assert weights.check(network, IMAGE, probe)['probe_difference'] < 1e-4


def test_half_precision_is_within_the_tolerance(tmp_path):
  network = toys.teacher()
  variables = {'params': network.params, 'batch_stats': network.batch_stats}
  weights.save_safetensors(tmp_path / 'w', variables, dtype='float16', probe=weights.make_probe(network, IMAGE))
  rounded = models.bind(network.module, weights.load(tmp_path / 'w', network.module, IMAGE),
                        mean=toys.MEAN, std=toys.STD)
  assert weights.check(rounded, IMAGE, weights.stored_probe(tmp_path / 'w'))['probe_difference'] > 0


@pytest.mark.parametrize('change', [
    {'mean': (0.0,), 'std': (1.0,)}, {'mean': toys.MEAN[::-1], 'std': toys.STD[::-1]}, {'params': None}])
def test_another_preprocessing_or_network_is_told_by_the_probe(change, probed):
  if 'params' in change:
    change = {'params': toys.nudged(toys.nudged(toys.nudged(toys.teacher().params)))}
  with pytest.raises(ValueError, match=r'^The logits of the probe are off by [^\n]*preprocessing[^\n]*$'):
    weights.check(toys.teacher().replace(**change), IMAGE, weights.stored_probe(probed))


def test_a_probe_of_other_images_is_left_out_and_of_other_classes_refused(probed):
  probe = weights.stored_probe(probed)
  found = weights.check(toys.teacher(), IMAGE, probe._replace(image_shape=(8, 8, 3)))
  assert found['probe_difference'] is None
  with pytest.raises(ValueError, match=r'has logits of the shape \(3, 4\), the network of \(3, 5\)'):
    weights.check(toys.teacher(), IMAGE, probe._replace(logits=tuple(row[:4] for row in probe.logits)))


def test_files_without_a_probe(tmp_path):
  (tmp_path / 'plain').write_bytes(safetensors_numpy.save({'a': np.ones(3)}))
  (tmp_path / 'other').write_bytes(b'PK\x03\x04')
  for name in ('plain', 'other', '.', 'plain#ema'):
    assert weights.stored_probe(f'{tmp_path}/{name}') is None


@pytest.mark.parametrize('text', [
    '', '{}', '[1]', '{"seed": 1}', '{"seed": -1, "image_shape": [1, 2, 3], "logits": [[1]], "tolerance": 1}',
    '{"seed": 1, "image_shape": [1, 2], "logits": [[1]], "tolerance": 1}',
    '{"seed": 1, "image_shape": [1, 2, 3], "logits": [[1], [1, 2]], "tolerance": 1}',
    '{"seed": 1, "image_shape": [1, 2, 3], "logits": "x", "tolerance": 1}'])
def test_damaged_probes_are_refused(text, tmp_path):
  (tmp_path / 'w').write_bytes(safetensors_numpy.save({'a': np.ones(3)}, metadata={'probe': text}))
  with pytest.raises(ValueError, match=r'^The probe in the metadata of [^\n]*w is damaged: [^\n]*$'):
    weights.stored_probe(tmp_path / 'w')


def test_the_same_weights_are_the_same_bytes(tmp_path):
  variables = {'params': {'fc': {'kernel': jnp.ones((2, 3)), 'bias': jnp.zeros(3)}}}
  about = {f'key{index}': 'é' * index for index in range(9)}
  written = set()
  for index in range(5):
    weights.save_safetensors(tmp_path / str(index), variables, about)
    written.add((tmp_path / str(index)).read_bytes())
  assert len(written) == 1
  assert weights.read_metadata(tmp_path / '0') == about
  assert set(weights.read(tmp_path / '0')) == {'params.fc.kernel', 'params.fc.bias'}
  weights.save_safetensors(tmp_path / 'one', variables, {'a': 'é"\\'})
  kernel, bias = np.ones((2, 3), np.float32), np.zeros(3, np.float32)
  assert (tmp_path / 'one').read_bytes() == safetensors_numpy.save(
      {'params.fc.kernel': kernel, 'params.fc.bias': bias}, metadata={'a': 'é"\\'})
