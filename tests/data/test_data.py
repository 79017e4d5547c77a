"""Data sets: what `prepare` writes, `data` and plain TFDS read."""

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import types

import numpy as np
import pytest
from image_arrays import idx

from dfkd_jax import data
from dfkd_jax.data import images as data_images
from dfkd_jax.data import prepare
from dfkd_jax.data import tfds as data_tfds
from dfkd_jax.data.prepare import writer
from dfkd_jax.data.prepare.__main__ import main


def arrays(size, shape, num_classes, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (size, *shape), np.uint8), rng.integers(0, num_classes, size)


def run(*arguments, **environment):
  """Runs a new Python process, as a user does."""
  return subprocess.run(
      [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False,
      timeout=120, env={**os.environ, **environment})


def fails_in_one_line(match):
  return pytest.raises(ValueError, match=rf'\A(?!.*\n).*{match}')


@pytest.mark.parametrize('shape', [(5, 9, 3), (11, 4, 1), (3, 6, 4)])
def test_what_is_written_is_read_in_the_same_order(tmp_path, shape):
  train, test = arrays(23, shape, 3), arrays(7, shape, 3, seed=1)
  train[1][0] = 2
  folder = prepare.write('tiny', {'train': train, 'test': test}, tmp_path)
  assert folder == tmp_path / 'tiny' / '1.0.0'
  assert [path.name for path in tmp_path.iterdir()] == ['tiny']
  for split, (images, labels) in {'train': train, 'test': test}.items():
    read = data.load('tiny', split, tmp_path, image_shape=shape)
    assert read.images.dtype == np.uint8
    assert read.labels.dtype == np.int32
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, labels)
    assert read.class_names == ('0', '1', '2')


def test_slices(tmp_path):
  images, labels = arrays(20, (4, 5, 3), 6)
  prepare.write('tiny', {'train': (images, labels), 'test': (images[:3], labels[:3])}, tmp_path)
  expected = {'train[:90%]': range(18), 'train[18:]': (18, 19), 'train[:2]+test[1:]': (0, 1, 1, 2),
              'train[-1:]': (19,)}
  for split, rows in expected.items():
    read = data.load('tiny', split, tmp_path)
    np.testing.assert_array_equal(read.images, images[list(rows)])
    np.testing.assert_array_equal(read.labels, labels[list(rows)])


def test_more_images_than_are_decoded_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(data_images, 'BATCH_SIZE', 4)
  images, labels = arrays(11, (2, 3, 1), 5)
  prepare.write('tiny', {'test': (images, labels)}, tmp_path)
  read = data.load('tiny', 'test', tmp_path)
  np.testing.assert_array_equal(read.images, images)
  np.testing.assert_array_equal(read.labels, labels)


def test_the_highest_version_is_read_unless_one_is_named(tmp_path):
  for version, value in (('1.0.0', 1), ('9.0.0', 9), ('10.0.0', 10)):
    images = np.full((2, 3, 3, 1), value, np.uint8)
    folder = prepare.write('tiny', {'test': (images, np.arange(2))}, tmp_path / version)
    (tmp_path / 'tiny').mkdir(exist_ok=True)
    folder.rename(tmp_path / 'tiny' / version)
  assert data.load('tiny', 'test', tmp_path).images.max() == 10
  assert data.load('tiny:9.0.0', 'test', tmp_path).images.max() == 9
  with fails_in_one_line("'tiny:2.0.0' is not prepared"):
    data.load('tiny:2.0.0', 'test', tmp_path)


def test_further_columns_count_over_all_splits(tmp_path):
  """The split written last has fewer classes and shorter texts."""
  columns = {'train': {'coarse_label': [0, 7, 3], 'id': ['a', 'bcd', 'e']},
             'test': {'coarse_label': [1], 'id': ['f']}}
  splits = {split: (*arrays(len(values['id']), (4, 5, 3), 2), values)
            for split, values in columns.items()}
  folder = prepare.write('tiny', splits, tmp_path)
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(folder)
  assert builder.info.features['coarse_label'].num_classes == 8
  assert [record['coarse_label'] for record in builder.as_data_source(split='train')] == [0, 7, 3]
  splits['test'] = splits['test'][:2]
  with fails_in_one_line(
      r"'test' of 'other' must be .*'coarse_label': .*'id': .*got \{'label': 'integers'\}"):
    prepare.write('other', splits, tmp_path)


@pytest.mark.parametrize(('column', 'message'), [
    ([1], r"Column 'id' of split 'train' .* must be 3 integers or strings, got int64 \(1,\)"),
    ([1.0, 2.0, 3.0], r"Column 'id' .* got float64 \(3,\)"),
    (['a', 'b', 'c'], r"must be .*'id': 'integers'.*\} as in other splits, got .*'id': 'strings'")])
@pytest.mark.parametrize('stored', [False, True])
def test_further_columns_that_do_not_fit(tmp_path, monkeypatch, column, message, stored):
  splits = {'test': (*arrays(2, (4, 5, 3), 2), {'id': [4, 2]}),
            'train': (*arrays(3, (4, 5, 3), 2), {'id': column})}
  if stored:
    prepare.write('tiny', {'test': splits.pop('test')}, tmp_path)
  monkeypatch.setattr(writer, 'encode_png', None)  # Nothing is encoded before.
  with fails_in_one_line(message):
    prepare.write('tiny', splits, tmp_path)


def cifar_archive(path, name, members):
  with tarfile.open(path, 'w:gz') as archive:
    for member, content in members.items():
      header = tarfile.TarInfo(f'{name}/{member}')
      header.size = len(content)
      archive.addfile(header, io.BytesIO(content))


def test_cifar100_archive_reads_in_plain_tfds_as_tfds_defines_it(tmp_path):
  import tensorflow_datasets as tfds
  planes, _ = arrays(5, (3, 32, 32), 2)
  coarse, fine = np.array([19, 0, 3, 3, 8], np.uint8), np.array([99, 0, 42, 7, 7], np.uint8)
  records = b''.join(
      bytes([c, f]) + p.tobytes() for c, f, p in zip(coarse, fine, planes, strict=True))
  names = [f'kind_{i}' for i in range(100)]
  cifar_archive(tmp_path / 'c.tar.gz', 'cifar-100-binary', {
      'train.bin': records, 'test.bin': records[:3074],
      'fine_label_names.txt': '\n'.join(names).encode() + b'\n'})
  data_dir = tmp_path / 'd'
  assert main(['cifar100', f'--source={tmp_path}/c.tar.gz', f'--data_dir={data_dir}']) == 0
  builder = tfds.builder_from_directory(data_dir / 'cifar100/3.0.2')
  for source in (tfds.data_source('cifar100', split='train', data_dir=data_dir, download=False),
                 builder.as_data_source(split='train')):
    assert len(source) == 5
    assert [record['label'] for record in source] == fine.tolist()
    assert [record['coarse_label'] for record in source] == coarse.tolist()
    assert source[4]['id'] in (b'train_00004', 'train_00004')
    np.testing.assert_array_equal(source[3]['image'], planes[3].transpose(1, 2, 0))
  read = data.load('cifar100', 'test', tmp_path / 'd', image_shape=(32, 32, 3))
  assert read.class_names == tuple(names)
  assert read.labels.tolist() == [99]


def test_cifar10_archive(tmp_path):
  planes, labels = arrays(6, (3, 32, 32), 10)
  records = [bytes([label]) + plane.tobytes() for label, plane in zip(labels, planes, strict=True)]
  members = {f'data_batch_{i}.bin': records[i - 1] for i in (3, 1, 5, 2, 4)}
  members |= {'test_batch.bin': records[5],
              'batches.meta.txt': b'\n'.join(b'k%d' % i for i in range(10)) + b'\n\n'}
  cifar_archive(tmp_path / 'c.tar.gz', 'cifar-10-batches-bin', members)
  prepare.write('cifar10', *prepared(tmp_path / 'c.tar.gz', 'cifar10', tmp_path / 'd'))
  read = data.load('cifar10', 'train+test', tmp_path / 'd')
  np.testing.assert_array_equal(read.images, planes.transpose(0, 2, 3, 1))
  np.testing.assert_array_equal(read.labels, labels)


def prepared(source, name, data_dir):
  splits, class_names = prepare.read(name, source, ('train', 'test'))
  assert class_names == [f'k{i}' for i in range(10)]
  return splits, data_dir


def test_idx_files_by_the_command_line(tmp_path):
  images, labels = arrays(4, (28, 28), 10)
  for prefix in ('train', 't10k'):
    idx(tmp_path / f'{prefix}-images-idx3-ubyte', images)
    idx(tmp_path / f'{prefix}-labels-idx1-ubyte', labels.astype(np.uint8))
  done = run('-m', 'dfkd_jax.prepare', 'mnist', '--source', tmp_path, '--data_dir', tmp_path / 'd')
  assert (done.returncode, done.stderr) == (0, '')
  read = data.load('mnist', 'train', tmp_path / 'd')
  np.testing.assert_array_equal(read.images[..., 0], images)
  assert read.class_names == tuple('0123456789')


@pytest.mark.parametrize(('arrays_', 'message'), [
    ({'train_images': np.zeros((3, 4, 5, 3), np.uint8)}, "no 'train_labels'"),
    ({'train_images': np.zeros((3, 4, 5, 3)), 'train_labels': np.arange(3)}, 'must be uint8'),
    ({'train_images': np.zeros((3, 4, 5, 3), np.uint8), 'train_labels': np.arange(2)},
     'must be 3 > 0 integers'),
])
def test_bad_input_exits_with_2_one_line_and_nothing_left(tmp_path, arrays_, message):
  np.savez(tmp_path / 'a.npz', **arrays_)
  done = run('-m', 'dfkd_jax.data.prepare', 'mine', '--source', tmp_path / 'a.npz',
             '--data_dir', tmp_path / 'd', '--splits', 'train')
  assert done.returncode == 2
  assert re.fullmatch(rf'error: .*{message}.*\n', done.stderr)
  assert not (tmp_path / 'd').exists()


def failing_sources(folder):
  """Returns (name, file, text that the message must have)."""
  (folder / 'cut.tar.gz').write_bytes(b'\x1f\x8b\x08 not a gzip file')
  cifar_archive(
      folder / 'less.tar.gz', 'c', {'train.bin': bytes(3074), 'fine_label_names.txt': b'a'})
  cifar_archive(folder / 'odd.tar.gz', 'c', {
      'train.bin': bytes(3074), 'test.bin': bytes(3000), 'fine_label_names.txt': b'a'})
  np.save(folder / 'one.npy', np.arange(3))
  (folder / 'one.npy').rename(folder / 'one.npz')
  (folder / 'short').mkdir()
  (folder / 'short/train-images-idx3-ubyte').write_bytes(b'\0\0\x08\x03\0\0\0\x05')
  (folder / 'empty').mkdir()
  return [
      ('cifar10', 'absent.tar.gz', 'No such file'), ('cifar10', 'cut.tar.gz', 'cannot be read'),
      ('cifar100', 'less.tar.gz', "no 'test.bin'"), ('cifar100', 'odd.tar.gz', 'size 3000'),
      ('svhn', 'less.tar.gz', "not 'svhn'"), ('mine', 'one.npz', 'not a zip file'),
      ('mnist', 'short', 'array of size 0'), ('mnist', 'empty', 'no train-images-idx3-ubyte.gz')]


def test_bad_sources_in_one_line(tmp_path, capsys):
  for name, file, message in failing_sources(tmp_path):
    status = main([name, '--source', str(tmp_path / file), '--data_dir', str(tmp_path / 'd')])
    lines = capsys.readouterr().err.splitlines()
    assert status == 2
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not (tmp_path / 'd').exists()


@pytest.mark.parametrize(('name', 'shape', 'labels', 'names', 'message'), [
    ('Tiny', (3, 4, 1), (0, 1), None, "snake_case, got 'Tiny'"),
    ('tiny', (3, 4, 2), (0, 1), None, r'got uint8 \(2, 3, 4, 2\)'),
    ('tiny', (3, 4, 1), (0, -1), None, '-1..0, must be 0..'),
    ('tiny', (3, 4, 1), (0, 3), ('a', 'b'), '0..3, must be 0..1'),
    ('tiny', (3, 4, 1), (.5, 1.), None, 'got float64'),
    ('cifar10', (28, 28, 1), (0, 1), None, r'must be \(32, 32, 3\) each'),
    ('cifar10', (32, 32, 3), (0, 1), ('a', 'b'), 'has 10 classes, got 2 class names'),
    ('mnist', (28, 28, 1), (0, 10), None, '0..10, must be 0..9'),
])
def test_what_cannot_be_written_is_refused(tmp_path, name, shape, labels, names, message):
  with fails_in_one_line(message):
    split = np.zeros((2, *shape), np.uint8), labels
    prepare.write(name, {'test': split}, tmp_path / 'd', class_names=names)
  assert not (tmp_path / 'd').exists()


def test_nothing_is_replaced_and_nothing_half_written_stays(tmp_path, monkeypatch):
  first = arrays(3, (2, 2, 1), 2)
  prepare.write('tiny', {'test': first}, tmp_path)
  with fails_in_one_line('already'):
    prepare.write('tiny', {'test': arrays(3, (2, 2, 1), 2, seed=1)}, tmp_path)
  np.testing.assert_array_equal(data.load('tiny', 'test', tmp_path).images, first[0])

  def break_off(image):
    raise KeyboardInterrupt

  monkeypatch.setattr(writer, 'encode_png', break_off)
  with pytest.raises(KeyboardInterrupt):
    prepare.write('other', {'test': first}, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['tiny']


def test_errors_say_where_was_looked_and_what_to_do(tmp_path, monkeypatch):
  prepare.write('flowers', {'test': arrays(3, (4, 5, 3), 2)}, tmp_path)
  with fails_in_one_line(
      f"'flower' is not prepared in {tmp_path}. Did you mean 'flowers'.*"
      '-m dfkd_jax.prepare folder --name flower --split test --source'):
    data.load('flower', 'test', tmp_path)
  with fails_in_one_line("'flowers' has no split 'train.:5.', only test in"):
    data.load('flowers', 'train[:5]', tmp_path)
  with fails_in_one_line('cannot be read'):
    data.load('flowers', 'test[:', tmp_path)
  with fails_in_one_line(r'image \(4, 5, 3\), must be \(5, 5, 3\), image_shape'):
    data.load('flowers', 'test', tmp_path, image_shape=(5, 5, 3))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'nowhere'))
  with fails_in_one_line(f'not prepared in .*assets.* or {tmp_path}/nowhere'):
    data.load('cifar10', 'test')
  with fails_in_one_line("no split 'train', only test in .*assets"):
    data.load('fashion_mnist', 'train')


def test_a_damaged_set_fails_in_one_line(tmp_path):
  folder = prepare.write('tiny', {'test': arrays(3, (4, 5, 3), 2)}, tmp_path)
  records = next(folder.glob('*array_record*'))
  records.write_bytes(records.read_bytes()[:1000])
  with fails_in_one_line("'tiny' cannot be read"):
    data.load('tiny', 'test', tmp_path)
  (folder / 'features.json').write_text('{')
  with fails_in_one_line('cannot be read'):
    data.load('tiny', 'test', tmp_path)


def stored_as(form, images, labels, folder):
  info = prepare.write('tiny', {'test': (images, labels)}, folder) / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', form))


def test_records_of_tensorflow_without_it_are_refused_in_one_line(tmp_path, monkeypatch):
  monkeypatch.setattr(data_tfds, 'find_spec', lambda name: None)
  stored_as('tfrecord', *arrays(3, (4, 5, 3), 2), tmp_path)
  with fails_in_one_line(r"stored as tfrecord.* pip install 'dfkd_jax\[tf\]'"):
    data.load('tiny', 'test', tmp_path)


def test_records_of_tensorflow_are_read_by_it(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  def as_dataset(builder, *, split, shuffle_files, read_config, decoders):
    assert (split, shuffle_files, read_config.interleave_cycle_length) == ('test[1:]', False, 1)
    assert isinstance(decoders['image'], tfds.decode.SkipDecoding)
    return [{'image': data_images.encode_png(images[i]), 'label': labels[i]} for i in range(1, 6)]

  monkeypatch.setattr(data_tfds, 'find_spec', lambda name: name)
  monkeypatch.setattr(tfds.core.DatasetBuilder, 'as_dataset', as_dataset)
  monkeypatch.setattr(tfds, 'as_numpy', lambda records: records)
  monkeypatch.setattr(tfds, 'ReadConfig', types.SimpleNamespace)
  images, labels = arrays(6, (4, 5, 3), 2)
  stored_as('tfrecord', images, labels, tmp_path)
  for shard, rows in {(0, 1): (1, 2, 3, 4, 5), (0, 2): (1, 3, 5), (1, 2): (2, 4)}.items():
    read = data.load('tiny', 'test[1:]', tmp_path, shard=shard)
    np.testing.assert_array_equal(read.images, images[list(rows)])
    np.testing.assert_array_equal(read.labels, labels[list(rows)])


def test_the_users_directory_serves_what_is_not_embedded(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  images, labels = arrays(3, (28, 28, 1), 10)
  prepare.write('fashion_mnist', {'train': (images, labels)}, tmp_path)
  np.testing.assert_array_equal(data.load('fashion_mnist', 'train').images, images)
  assert len(data.load('fashion_mnist', 'test[:7]').images) == 7


def test_embedded_fashion_mnist_is_the_published_test_set():
  read = data.load('fashion_mnist', 'test', image_shape=(28, 28, 1))
  assert np.bincount(read.labels).tolist() == [1000] * 10
  assert read.class_names[0] == 'T-shirt/top'
  assert read.labels[:5].tolist() == [9, 2, 1, 1, 6]
  pixels = hashlib.sha256(read.images.tobytes()).hexdigest()
  card = (data.EMBEDDED / 'fashion_mnist' / 'README.md').read_text()
  assert pixels == 'c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a'
  assert pixels in card
  assert hashlib.sha256(read.labels.astype(np.uint8).tobytes()).hexdigest() in card
  records = next((data.EMBEDDED / 'fashion_mnist/3.0.1').glob('*array_record*'))
  assert hashlib.sha256(records.read_bytes()).hexdigest() in card


def test_plain_tfds_reads_the_embedded_set():
  import tensorflow_datasets as tfds
  source = tfds.data_source(
      'fashion_mnist', split='test[9990:]', data_dir=data.EMBEDDED, download=False)
  read = data.load('fashion_mnist', 'test[9990:]')
  assert [record['label'] for record in source] == read.labels.tolist()
  np.testing.assert_array_equal([record['image'] for record in source], read.images)


def test_neither_tensorflow_nor_noise(tmp_path):
  program = (
      'import sys\nfrom dfkd_jax import data\nassert "tensorflow_datasets" not in sys.modules\n'
      'data.load("fashion_mnist", "test[:3]")\nassert "tensorflow" not in sys.modules\n')
  done = run('-c', program, TFDS_DATA_DIR=str(tmp_path))
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
