"""Folders of photos and users' arrays, prepared by the command line; splits added later."""

import io
import json
import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from dfkd_jax import data
from dfkd_jax.data import images, prepare
from dfkd_jax.data.prepare.__main__ import main


def save(path, size=(9, 7), value=0, mode='RGB', **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), np.uint8)
  Image.fromarray(pixels).convert(mode).save(path, **options)
  return path


def folder_of_classes(root):
  """Writes photos of several sizes, formats and depths; returns their paths by class."""
  return {
      'bee': [save(root / 'bee/10.JPEG', (8, 11), 1), save(root / 'bee/9.jpg', (12, 6), 2, 'L')],
      'ant': [save(root / 'ant/more/a.jpeg', (5, 9), 3)],
      'cat': [save(root / 'cat/x.png', (7, 7), 4), save(root / 'cat/y.jpg', (6, 10), 5)],
  }


def prepare_by_line(capsys, *arguments):
  """Returns the exit status and the only line of output."""
  status = main([str(argument) for argument in arguments])
  output = capsys.readouterr()
  lines = (output.err if status else output.out).splitlines()
  assert len(lines) == 1, lines
  return status, lines[0]


def raw_records(name, split, data_dir, version='1.0.0'):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(pathlib.Path(data_dir) / name / version)
  encoded = {'image': tfds.decode.SkipDecoding()}
  return builder, list(builder.as_data_source(split=split, decoders=encoded))


def test_a_folder_of_classes_is_stored_as_it_is_and_read_back(tmp_path, capsys):
  paths = folder_of_classes(tmp_path / 'photos')
  (tmp_path / 'photos/bee/notes.txt').write_text('no image')
  (tmp_path / 'photos/.hidden').mkdir()
  status, line = prepare_by_line(
      capsys, 'folder', f'--source={tmp_path}/photos', f'--data_dir={tmp_path}/d')
  assert (status, line) == (0, f'Wrote 5 test images to {tmp_path}/d/photos/1.0.0')
  builder, records = raw_records('photos', 'test', tmp_path / 'd')
  in_order = [*paths['ant'], *paths['bee'], *paths['cat']]
  assert [record['image'] for record in records] == [path.read_bytes() for path in in_order]
  assert [record['file_name'] for record in records] == [path.name.encode() for path in in_order]
  assert builder.info.features['image'].shape == (None, None, 3)
  assert builder.info.features['image'].encoding_format == 'png'  # Since there is one.
  read = data.load('photos', 'test', tmp_path / 'd', image_shape=(6, 6, 3), crop=0.9)
  assert read.class_names == ('ant', 'bee', 'cat')
  assert read.labels.tolist() == [0, 1, 1, 2, 2]
  for path, image in zip(in_order, read.images, strict=True):
    expected = images.decode_image(path.read_bytes(), 3, (6, 6, 3), 0.9)
    np.testing.assert_array_equal(image, expected)


def test_plain_tfds_reads_photos_in_colour(tmp_path):
  folder_of_classes(tmp_path / 'photos')
  save(tmp_path / 'photos/ant/z.jpg', (11, 13), 6, 'CMYK', quality=100)
  split, names = prepare.read_folder(tmp_path / 'photos')
  folder = prepare.write('photos', {'test': split}, tmp_path, class_names=names)
  import tensorflow_datasets as tfds

  source = tfds.builder_from_directory(folder).as_data_source(split='test')
  for record, path in zip(source, split.images, strict=True):
    expected = np.asarray(Image.open(path).convert('RGB'))
    np.testing.assert_array_equal(record['image'], expected, path)


@pytest.mark.parametrize(('mode', 'form', 'kept'), [
    ('RGB', 'jpeg', True), ('L', 'jpeg', True), ('RGB', 'png', True), ('L', 'png', True),
    ('CMYK', 'jpeg', False), ('P', 'png', False), ('RGBA', 'png', False), ('LA', 'png', False),
    ('1', 'png', False), ('RGB', 'bmp', False),
])
def test_only_what_readers_would_show_in_different_ways_is_coded_anew(tmp_path, mode, form, kept):
  path = save(tmp_path / f'a.{form}', (13, 9), 7, mode)
  raw = images.encode_file(path)
  assert (raw == path.read_bytes()) == kept
  if not kept:
    image = Image.open(io.BytesIO(raw))
    assert (image.format, image.mode) == ('PNG', 'RGB')
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path).convert('RGB')))


def test_classes_of_a_file_fix_the_labels_and_some_may_have_no_image(tmp_path):
  folder_of_classes(tmp_path / 'photos')
  (tmp_path / 'names.txt').write_text('dog\ncat\n\nbee \nant\nfly\n')
  (files, labels, columns), names = prepare.read_folder(
      tmp_path / 'photos', classes=tmp_path / 'names.txt')
  assert names == ['dog', 'cat', 'bee', 'ant', 'fly']
  assert labels.tolist() == [3, 2, 2, 1, 1]
  assert columns['file_name'].tolist() == [os.path.basename(path) for path in files]


@pytest.mark.parametrize(('lines', 'classes', 'labels', 'names'), [
    ('c.png n07 0 0 9\na.png\tn02\nb.jpg n07', None, [1, 0, 1], ['n02', 'n07']),
    ('a.png 10\nb.jpg 9\nc.png 0', None, [10, 9, 0], [str(i) for i in range(11)]),
    ('a.png n07\nb.jpg 2\nc.png n02', 'n07\nn05\nn02', [0, 2, 2], ['n07', 'n05', 'n02']),
])
def test_a_flat_folder_and_a_list(tmp_path, lines, classes, labels, names):
  for i, name in enumerate(('a.png', 'b.jpg', 'c.png')):
    save(tmp_path / 'val' / name, value=i)
  (tmp_path / 'list.txt').write_text(lines)
  if classes:
    (tmp_path / 'names.txt').write_text(classes)
  (files, indices, columns), class_names = prepare.read_folder(
      tmp_path / 'val', labels=tmp_path / 'list.txt', classes=classes and tmp_path / 'names.txt')
  assert indices.tolist() == labels
  assert class_names == names
  assert columns['file_name'].tolist() == [line.split()[0] for line in lines.splitlines()]
  assert [os.path.basename(path) for path in files] == columns['file_name'].tolist()


def broken_folders(root):
  """Returns (options, pattern that the message must match)."""
  for name in ('flat', 'hollow/full', 'cut/a', 'text/a', 'deep/a'):
    save(root / name / 'x.png')
  (root / 'hollow/nothing').mkdir()
  whole = save(root / 'cut/a/y.jpg', (90, 80)).read_bytes()
  (root / 'cut/a/y.jpg').write_bytes(whole[:len(whole) // 2])
  (root / 'text/a/w.jpeg').write_text('not an image')
  Image.fromarray(np.zeros((4, 4), np.uint16)).save(root / 'deep/a/v.png')
  for name, text in {
      'empty': '\n', 'twice': 'a\nb\na', 'other': 'b\nc', 'odd': 'x.png', 'none': 'z.png 0',
      'both': 'x.png 0\nx.png 1', 'ten': 'x.png 10', 'less': 'x.png 0'}.items():
    (root / name).write_text(text)
  save(root / 'two/x.png')
  save(root / 'two/y.png')
  source = lambda name, **files: [
      f'--source={root}/{name}', *(f'--{option}={root}/{file}' for option, file in files.items())]
  return [
      (source('absent'), "no folder '.*absent'"), (source('flat'), 'has no sub-folders'),
      (source('hollow'), "Class 'nothing' is empty"),
      (source('cut'), r"Image '.*cut/a/y.jpg' cannot be read: .*truncated"),
      (source('text'), r"Image '.*text/a/w.jpeg' cannot be read: "),
      (source('deep'), r"v.png' .*more than 8 bits"),
      (source('cut', classes='absent.txt'), 'absent.txt.* cannot be read'),
      (source('cut', classes='empty'), 'no line'),
      (source('cut', classes='twice'), "class 'a' twice"),
      (source('cut', classes='other'), "Unknown label 'a', must be .* 2 classes 'b' to 'c'"),
      (source('flat', labels='odd'), "line 'x.png', must be"),
      (source('flat', labels='both'), "line 'x.png 1', must be"),
      (source('flat', labels='none'), "names 'z.png'"),
      (source('flat', labels='ten', classes='other'), "label '10'.*number"),
      (source('two', labels='less'), "does not name '.*two/y.png'"),
      ([*source('flat'), '--split', 'a', 'b'], '--split is a b, must be one'),
      ([*source('cut'), '--name=Cut'], "snake_case, got 'Cut'"),
  ]


def test_broken_folders_in_one_line_and_nothing_left(tmp_path, capsys):
  for options, message in broken_folders(tmp_path):
    status, line = prepare_by_line(capsys, 'folder', f'--data_dir={tmp_path}/d', *options)
    assert status == 2
    assert re.search(message, line), line
    assert not (tmp_path / 'd').exists() or not list((tmp_path / 'd').iterdir())


def test_options_of_a_folder_are_for_folders(tmp_path, capsys):
  for what, option in (('mnist', '--name=a'), ('mine', '--labels=a'), ('arrays', '--classes=a')):
    status, line = prepare_by_line(capsys, what, option, f'--source={tmp_path}')
    assert status == 2
    assert f'{option[:-2]} is not for {what!r}' in line


def test_arrays(tmp_path, capsys):
  images = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 3), np.uint8)
  labels = np.array([2, 0, 1, 2, 0])
  np.savez(tmp_path / 'mine.npz', images=images, labels=labels, class_names=['a', 'b', 'c'])
  line = ('arrays', f'--source={tmp_path}/mine.npz', f'--data_dir={tmp_path}/d')
  assert prepare_by_line(capsys, *line) == (0, f'Wrote 5 test images to {tmp_path}/d/mine/1.0.0')
  assert prepare_by_line(capsys, *line, '--name=yours', '--split=train')[0] == 0
  for name, split in (('mine', 'test'), ('yours', 'train')):
    read = data.load(name, split, tmp_path / 'd')
    np.testing.assert_array_equal(read.images, images)
    assert (read.labels.tolist(), read.class_names) == ([2, 0, 1, 2, 0], ('a', 'b', 'c'))
  np.savez(tmp_path / 'less.npz', images=images)
  for file, message in (('less', "no 'labels'"), ('absent', 'No such file')):
    status, error = prepare_by_line(
        capsys, 'arrays', f'--source={tmp_path}/{file}.npz', f'--data_dir={tmp_path}/d')
    assert status == 2
    assert message in error


def test_splits_are_added_one_after_the_other(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (9, 4, 3, 3), np.uint8)
  splits = {'test': slice(0, 2), 'train': slice(2, 7), 'more': slice(7, 9)}
  texts = np.array(list('abcdefghi'))
  for split, rows in splits.items():
    columns = {'text': texts[rows], 'kind': np.arange(9)[::-1][rows]}
    folder = prepare.write(
        'tiny', {split: (images[rows], np.arange(9)[rows] % 2, columns)}, tmp_path,
        class_names=None if split == 'more' else ['even', 'odd'])
  builder, records = raw_records('tiny', 'test+train+more', tmp_path)
  sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
  assert sizes == {'test': 2, 'train': 5, 'more': 2}
  assert [record['text'] for record in records] == [text.encode() for text in texts]
  assert [record['kind'] for record in records] == list(range(9))[::-1]
  assert builder.info.features['kind'].num_classes == 9
  read = data.load('tiny', 'test+train+more', tmp_path)
  np.testing.assert_array_equal(read.images, images)
  assert read.class_names == ('even', 'odd')
  assert sorted(path.name for path in folder.iterdir()) == sorted([
      'dataset_info.json', 'features.json', 'label.labels.txt',
      *(f'tiny-{split}.array_record-00000-of-00001' for split in splits)])
  assert [path.name for path in tmp_path.iterdir()] == ['tiny']


def test_photos_that_are_all_jpeg_are_said_to_be_until_one_is_not(tmp_path):
  save(tmp_path / 'a/x/0.jpg'), save(tmp_path / 'b/x/0.png')
  for split, form in (('a', 'jpeg'), ('b', 'png')):
    images, names = prepare.read_folder(tmp_path / split)
    prepare.write('imagenet2012', {split: images}, tmp_path / 'd', class_names=names)
    builder, _ = raw_records('imagenet2012', split, tmp_path / 'd', version='5.1.0')
    assert builder.info.features['image'].encoding_format == form


@pytest.mark.parametrize(('split', 'shape', 'names', 'columns', 'message'), [
    ('test', (4, 3, 3), ['a', 'b'], {'id': [0, 1]}, "'tiny' already has split 'test' in"),
    ('train', (4, 3, 1), ['a', 'b'], {'id': [0, 1]}, r'must be \(4, 3, 3\) each, got \(4, 3, 1\)'),
    ('train', (4, 3, 3), ['a', 'c'], {'id': [0, 1]}, "Class 1 of 'tiny' is 'c', must be 'b'"),
    ('train', (4, 3, 3), ['a', 'b', 'c'], {'id': [0, 1]}, "Class 2 of 'tiny' is 'c', must be None"),
    ('train', (4, 3, 3), None, {}, r"must be .*'id': .*, got \{'label': 'integers'\}"),
])
def test_a_split_that_does_not_fit_changes_nothing(
    tmp_path, split, shape, names, columns, message):
  def write(split, shape, names, columns):
    arrays = np.zeros((2, *shape), np.uint8), np.arange(2), columns
    return prepare.write('tiny', {split: arrays}, tmp_path, class_names=names)

  folder = write('test', (4, 3, 3), ['a', 'b'], {'id': [0, 1]})
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  with pytest.raises(ValueError, match=rf'\A(?!.*\n).*{message}'):
    write(split, shape, names, columns)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_error_while_a_split_is_added_changes_nothing(tmp_path):
  save(tmp_path / 'good/a/x.jpg'), save(tmp_path / 'bad/a/x.jpg')
  (tmp_path / 'bad/a/y.jpg').write_text('not an image')
  good, names = prepare.read_folder(tmp_path / 'good')
  bad, _ = prepare.read_folder(tmp_path / 'bad')
  folder = prepare.write('tiny', {'test': good}, tmp_path / 'd', class_names=names)
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  with pytest.raises(ValueError, match=r'y\.jpg'):
    prepare.write('tiny', {'train': bad}, tmp_path / 'd', class_names=names)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
  assert [path.name for path in (tmp_path / 'd').iterdir()] == ['tiny']


@pytest.mark.parametrize('moved', [0, 1, 2, 3])
def test_a_split_can_be_added_again_after_an_interruption(tmp_path, monkeypatch, moved):
  test, train = ((np.full((2, 3, 3, 1), value, np.uint8), np.arange(2)) for value in (7, 8))
  prepare.write('tiny', {'test': test}, tmp_path)
  done = []

  def replace(path, target, real=pathlib.Path.replace):
    if len(done) == moved:
      raise KeyboardInterrupt
    done.append(real(path, target))

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'replace', replace)
    with pytest.raises(KeyboardInterrupt):
      prepare.write('tiny', {'train': train}, tmp_path)
  np.testing.assert_array_equal(data.load('tiny', 'test', tmp_path).images, test[0])
  with pytest.raises(ValueError, match="has no split 'train'"):
    data.load('tiny', 'train', tmp_path)
  prepare.write('tiny', {'train': train}, tmp_path)
  np.testing.assert_array_equal(data.load('tiny', 'train', tmp_path).images, train[0])


def test_splits_cannot_be_added_to_other_formats_or_damaged_data_sets(tmp_path):
  split = np.zeros((2, 3, 3, 1), np.uint8), np.arange(2)
  folder, train = prepare.write('tiny', {'test': split}, tmp_path), {'train': split}
  info = folder / 'dataset_info.json'
  content = json.loads(info.read_text())
  info.write_text(json.dumps(content | {'fileFormat': 'tfrecord'}))
  with pytest.raises(ValueError, match=r'\A(?!.*\n).*stored as tfrecord, must be array_record'):
    prepare.write('tiny', train, tmp_path)
  info.write_text('{')
  with pytest.raises(ValueError, match=r'\A(?!.*\n).*already exists, but cannot be read'):
    prepare.write('tiny', train, tmp_path)
