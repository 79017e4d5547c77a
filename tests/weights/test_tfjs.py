"""Layers models of TensorFlow.js: shards, dtypes, quantization; and nothing beyond their folder."""

import numpy as np
import pytest
from tfjs_files import write

from dfkd_jax import weights

KERNEL = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
BIAS = np.array([-3, 0, 2**30, 7, 5], np.int32)
SMALL = np.array([[0, 17, 255]], np.uint8)


def entry(name, shape, dtype='float32', **more):
  return {'name': name, 'shape': list(shape), 'dtype': dtype} | more


PLAIN = [entry('conv1/kernel', KERNEL.shape), entry('conv1/conv1/bias:0', BIAS.shape, 'int32'),
         entry('mask', SMALL.shape, 'uint8'), entry('scalar', ())]
PLAIN_DATA = KERNEL.tobytes() + BIAS.tobytes() + SMALL.tobytes() + np.float32(2.5).tobytes()


def test_arrays_lie_end_to_end_across_shards(tmp_path):
  folder = write(tmp_path / 'model', PLAIN, PLAIN_DATA, cuts=(7, 50, 51))  # Also within a number.
  for path in (folder, folder / 'model.json'):
    read = weights.read(path)
    assert list(read) == ['conv1/kernel', 'conv1/bias', 'mask', 'scalar']
    arrays = KERNEL, BIAS, SMALL, np.float32(2.5)
    for array, expected in zip(read.values(), arrays, strict=True):
      assert array.dtype == expected.dtype
      np.testing.assert_array_equal(array, expected)


def test_quantized_numbers_are_decoded(tmp_path):
  """By hand: number * scale + min."""
  folder = write(tmp_path / 'model', [
      entry('a', (2, 2), quantization={'dtype': 'uint8', 'scale': 0.5, 'min': -3}),
      entry('b', (3,), quantization={'dtype': 'uint16', 'scale': 2.0, 'min': 1}),
      entry('c', (2,), 'int32', quantization={'dtype': 'uint8', 'scale': 0.4, 'min': 0}),
      entry('d', (2,), quantization={'dtype': 'float16'})],
      bytes([0, 1, 6, 255]) + np.array([0, 1, 65535], '<u2').tobytes() + bytes([3, 4])
      + np.array([-1.5, 0.25], '<f2').tobytes())
  read = weights.read(folder)
  np.testing.assert_array_equal(read['a'], np.float32([[-3, -2.5], [0, 124.5]]))
  np.testing.assert_array_equal(read['b'], np.float32([1, 3, 131071]))
  np.testing.assert_array_equal(read['c'], np.int32([1, 2]))
  np.testing.assert_array_equal(read['d'], np.float32([-1.5, 0.25]))
  assert [array.dtype.name for array in read.values()] == ['float32', 'float32', 'int32', 'float32']


@pytest.mark.parametrize(('entries', 'model', 'message'), [
    ([entry('s', (1,), 'string')], {}, 'holds s as string, which is not supported'),
    ([entry('s', (12,), 'complex64', quantization={'dtype': 'uint8', 'scale': 1, 'min': 0})], {},
     'holds s as complex64'),
    (PLAIN, {'format': 'graph-model'}, 'is a graph-model of TensorFlow.js'),
    (PLAIN, {'weightsManifest': [{'paths': ['../secret.bin'], 'weights': PLAIN}]},
     "names '../secret.bin', which lies"),
    (PLAIN, {'weightsManifest': [{'paths': ['gone.bin'], 'weights': PLAIN}]},
     'lacks its file gone.bin'),
    ([entry('a', (2,)), entry('a:0', (1,))], {}, 'holds two arrays called a')])
def test_unsupported_content_is_refused_by_name(entries, model, message, tmp_path):
  (tmp_path / 'secret.bin').write_bytes(PLAIN_DATA)
  data = PLAIN_DATA if entries is PLAIN else bytes(12)
  folder = write(tmp_path / 'model', entries, data, **model)
  with pytest.raises(ValueError, match=rf'^Refused to read [^\n]*: it {message}'):
    weights.read(folder)


@pytest.mark.parametrize('name', [
    '/etc/hosts', 'a/../../b', '..', 'a\\..\\b', 'C:b', 'C:/b', '//host/share/b', '\\b'])
def test_names_that_leave_the_folder_are_refused(name, tmp_path):
  manifest = [{'paths': [name], 'weights': PLAIN}]
  folder = write(tmp_path / 'model', PLAIN, PLAIN_DATA, weightsManifest=manifest)
  with pytest.raises(ValueError, match=r'^Refused to [^\n]*: it names [^\n]* outside [^\n]*\.$'):
    weights.read(folder)


def test_names_in_messages_are_short_and_harmless(tmp_path):
  manifests = [{'paths': ['\x1b[2J' * 40], 'weights': PLAIN},
               {'paths': [], 'weights': [entry('\x1b[2J' * 999, (1,), 'x' * 999)]}]
  for model in ({'format': '\x1b[2J' * 999}, *({'weightsManifest': [each]} for each in manifests)):
    with pytest.raises(ValueError, match='Refused to read') as error:
      weights.read(write(tmp_path / 'model', PLAIN, PLAIN_DATA, **model))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_links_in_a_folder_are_followed(tmp_path):
  """In the hub's cache, snapshots/<revision>/sub/file is a link to blobs/<hash>."""
  folder = write(tmp_path / 'snapshots' / 'v1' / 'sub', PLAIN, PLAIN_DATA, cuts=(60,))
  (tmp_path / 'blobs').mkdir()
  for number, path in enumerate(list(folder.iterdir())):
    path.rename(tmp_path / 'blobs' / str(number))
    path.symlink_to(f'../../../blobs/{number}')
  for path in (folder, folder / 'model.json'):
    np.testing.assert_array_equal(weights.read(path)['conv1/kernel'], KERNEL)


def test_other_json_is_refused(tmp_path):
  (tmp_path / 'model.json').write_text('{"weights": [1, 2]}')
  with pytest.raises(ValueError, match='has no weightsManifest'):
    weights.read(tmp_path / 'model.json')


@pytest.mark.parametrize('share', np.arange(10) / 10)
@pytest.mark.parametrize('name', ['model.json', 'group1-shard1of2.bin', 'group1-shard2of2.bin'])
def test_truncated_files_give_one_clear_error(name, share, tmp_path):
  folder = write(tmp_path / 'model', PLAIN, PLAIN_DATA, cuts=(60,))
  data = (folder / name).read_bytes()
  (folder / name).write_bytes(data[:int(share * len(data))])
  with pytest.raises(ValueError, match=r'^(Could not|Refused to) read [^\n]*model: it [^\n]*$'):
    weights.read(folder)


@pytest.mark.parametrize('changed', [
    entry('conv1/kernel', (3, 2, 6)), entry('conv1/kernel', (3, 2, 4)),
    entry('conv1/kernel', (3, -2, 5)), entry('conv1/kernel', (2**40, 2**40)),
    entry('conv1/kernel', (1,) * 65), {'name': 'conv1/kernel'}, entry('conv1/kernel', ('x',)), 5])
def test_shapes_that_do_not_fill_the_shards_give_one_clear_error(changed, tmp_path):
  folder = write(tmp_path / 'model', [changed, *PLAIN[1:]], PLAIN_DATA)
  with pytest.raises(ValueError, match=r'^Could not read [^\n]*: it is truncated or damaged '):
    weights.read(folder)
