"""Folders and arrays of images and masks, prepared by the command line; CamVid."""

import re

import numpy as np
import pytest
from conftest import SHARED
from image_arrays import fails_in_one_line, image_pairs, png, save
from PIL import Image

from dfkd_jax import data
from dfkd_jax.data import prepare
from dfkd_jax.data.prepare.__main__ import main


def prepare_by_line(capsys, *arguments):
  """Returns the exit status and the only line of output."""
  status = main([str(argument) for argument in arguments])
  output = capsys.readouterr()
  line, = (output.err if status else output.out).splitlines()
  return status, line


def save_camvid(root, split, count, seed=0, height=5, width=8):
  """Writes images and masks as the tutorial of SegNet has them; returns both."""
  images, masks = image_pairs(count, height, width, seed=seed)
  masks[0, 0, 0] = 10
  for i in range(count):
    save(root / split / f'0001TP_{i:05d}.png', images[i])
    save(root / f'{split}annot' / f'0001TP_{i:05d}.png', masks[i])
  return images, masks


def test_folders_of_pairs_split_by_split(tmp_path, capsys):
  classes = [f'class_{i}' for i in range(11)]
  (tmp_path / 'classes.txt').write_text('\n'.join(classes))
  pairs = {'test': save_camvid(tmp_path / 'c', 'test', 5),
           'train': save_camvid(tmp_path / 'c', 'train', 7, seed=1, height=6)}
  pairs['train'][1][3] = 11  # Void, which is no class. It is checked when a run loads it.
  save(tmp_path / 'c/trainannot/0001TP_00003.png', pairs['train'][1][3])
  for split, (images, masks) in pairs.items():
    first = [f'--classes={tmp_path}/classes.txt'] if split == 'test' else []
    status, line = prepare_by_line(
        capsys, 'folder', f'--source={tmp_path}/c/{split}', f'--masks={tmp_path}/c/{split}annot',
        '--name=camvid', f'--split={split}', f'--data_dir={tmp_path}/d', *first)
    assert (status, line) == (0, f'Wrote {len(images)} {split} images to {tmp_path}/d/camvid/1.0.0')
    read = data.load('camvid', split, tmp_path / 'd')
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, masks)
    assert read.class_names == tuple(classes)
  import tensorflow_datasets as tfds

  source = tfds.data_source('camvid', split='test', data_dir=tmp_path / 'd', download=False)
  assert [row['file_name'] for row in source] == [b'0001TP_%05d.png' % i for i in range(5)]
  np.testing.assert_array_equal(
      [row['segmentation_label'][..., 0] for row in source], pairs['test'][1])


def test_the_first_label_and_sub_folders_and_other_suffixes(tmp_path, capsys):
  """NYUv2: the value 0 is unlabelled, 1 is class 0. Masks with a palette are stored as grey."""
  images, masks = image_pairs(3, 4, 7, highest=3)
  masks[1, 2, 2] = 255
  for i, name in enumerate(('a/1', 'b/1', 'c')):
    save(tmp_path / f'image/train/{name}.bmp', images[i])
    path = tmp_path / f'seg13/train/{name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(masks[i], 'P' if i else None))
  status, _ = prepare_by_line(
      capsys, 'folder', f'--source={tmp_path}/image/train', f'--masks={tmp_path}/seg13/train',
      '--name=nyuv2', '--split=train', '--first_label=1', f'--data_dir={tmp_path}/d')
  assert status == 0
  read = data.load('nyuv2', 'train', tmp_path / 'd')
  by_hand = {0: 255, 1: 0, 2: 1, 3: 2, 255: 255}
  np.testing.assert_array_equal(read.labels, np.vectorize(by_hand.get)(masks))
  np.testing.assert_array_equal(read.images, images)
  assert read.class_names == ('0', '1', '2')
  import tensorflow_datasets as tfds

  source = tfds.data_source('nyuv2', split='train', data_dir=tmp_path / 'd', download=False)
  np.testing.assert_array_equal(
      [row['segmentation_label'][..., 0] for row in source], read.labels)


def test_arrays_by_the_command_line(tmp_path, capsys):
  images, masks = image_pairs(3, 4, 5)
  np.savez(tmp_path / 'mine.npz', images=images, labels=masks.astype(np.int16),
           class_names=[f'c{i}' for i in range(4)])
  status, _ = prepare_by_line(
      capsys, 'arrays', f'--source={tmp_path}/mine.npz', f'--data_dir={tmp_path}/d')
  assert status == 0
  read = data.load('mine', 'test', tmp_path / 'd')
  np.testing.assert_array_equal(read.labels, masks)
  assert read.class_names == ('c0', 'c1', 'c2', 'c3')


def broken_pairs(root):
  """Returns (options, pattern that the message must match)."""
  image, mask = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)
  content = {'alone': None, 'small': mask[:3], 'rgb': image, 'deep': mask.astype(np.uint16),
             'void': mask + np.uint8(255), 'good': mask}
  for name, wrong in content.items():
    for folder, array in ((name, image), (f'{name}_m', mask)):
      save(root / folder / 'sub/x.png', array)
    if wrong is not None:
      save(root / f'{name}_m' / 'sub/x.png', wrong)
  save(root / 'alone/sub/y.png', image)
  save(root / 'twice/sub/x.png', image), save(root / 'twice/sub/x.bmp', image)
  (root / 'empty').mkdir()
  path = save(root / 'cut_m/sub/x.png', np.arange(24, dtype=np.uint8).reshape(4, 6))
  path.write_bytes(path.read_bytes()[:60])
  (root / 'names').write_text('a\na')

  def options(source, masks=None, *more):
    return [f'--source={root}/{source}', f'--masks={root}/{masks or f"{source}_m"}', *more]

  return [
      (options('alone'), "Image '.*alone/sub/y.png' has no mask .*alone_m'"),
      (options('good', 'alone'), "Mask '.*alone/sub/y.png' has no image .*good'"),
      (options('small'), "Mask '.*small_m/sub/x.png' .*3 x 6, must be 4 x 6, .*small/sub/x.png'"),
      (options('rgb'), "Mask '.*rgb_m/sub/x.png' .* its mode is RGB, must be grey or palette"),
      (options('deep'), "Mask '.*deep_m/sub/x.png' .* its mode is I"),
      (options('void'), "Masks of 'mine' have no class: all pixels are 255"),
      (options('good', 'cut_m'), "Mask '.*cut_m/sub/x.png' cannot be read"),
      (options('twice', 'good_m'), "twice/sub/x.bmp' and '.*twice/sub/x.png' have the same name"),
      (options('empty', 'good_m'), "no image in '.*empty'"),
      (options('good', 'absent'), "no folder '.*absent'"),
      (options('good', None, '--first_label=-1'), 'first_label is -1, must be in 0..254'),
      (options('good', None, f'--classes={root}/names'), "class 'a' twice"),
      (options('good', None, f'--labels={root}/names'), '--masks and --labels exclude'),
      ([f'--source={root}/good', '--first_label=1'], '--first_label needs --masks')]


def test_broken_pairs_in_one_line_and_nothing_left(tmp_path, capsys):
  for options, message in broken_pairs(tmp_path):
    status, line = prepare_by_line(
        capsys, 'folder', f'--data_dir={tmp_path}/d', '--name=mine', *options)
    assert status == 2
    assert re.search(message, line), (line, message)
    assert not (tmp_path / 'd').exists() or not list((tmp_path / 'd').iterdir())
  status, line = prepare_by_line(capsys, 'mnist', f'--source={tmp_path}', '--masks=a')
  assert (status, "--masks is not for 'mnist'" in line) == (2, True)


@pytest.mark.parametrize(('masks', 'message'), [
    (np.full((2, 4, 3), 256), "Masks of split 'test' of 'tiny' are 256..256, must be 0..255"),
    (np.full((2, 4, 3), -1), r'are -1..-1, must be 0..255'),
    (np.zeros((2, 3, 4), int), r'or masks of shape \(2, 4, 3\), got int64 \(2, 3, 4\)'),
    (np.zeros((2, 4, 3)), 'got float64'),
    (prepare.MaskFiles(['a', 'b']), r'shape \(2, 4, 3\), got uint8 \(2, None, None\)')])
def test_arrays_that_are_no_masks(tmp_path, masks, message):
  with fails_in_one_line(message):
    prepare.write('tiny', {'test': (np.zeros((2, 4, 3, 3), np.uint8), masks)}, tmp_path / 'd')
  assert not (tmp_path / 'd').exists()


def test_splits_with_masks_and_with_classes_do_not_mix(tmp_path):
  images, masks = image_pairs(2, 4, 3)
  splits = {'masks': (images, masks), 'classes': (images, np.arange(2))}
  with fails_in_one_line("must be {'segmentation_label': 'masks'} as in other splits, got {'lab"):
    prepare.write('tiny', splits, tmp_path)
  prepare.write('tiny', {'classes': splits.pop('classes')}, tmp_path)
  with fails_in_one_line("must be {'label': 'integers'} as in other splits"):
    prepare.write('tiny', splits, tmp_path)


def test_camvid(tmp_path):
  path = SHARED / 'data' / 'camvid'
  if not path.is_dir():
    pytest.skip('CamVid is not at hand.')
  images = np.asarray(Image.open(path / 'test_images.webp'))[:180, :5 * 240, :3]
  masks = np.asarray(Image.open(path / 'test_labels.png'))[:180, :5 * 240]
  images, masks = (np.stack(np.split(mosaic, 5, axis=1)) for mosaic in (images, masks))
  prepare.write('camvid', {'test': (images, masks)}, tmp_path)
  read = data.load('camvid', 'test', tmp_path, image_shape=(180, 240, 3))
  np.testing.assert_array_equal(read.images, images)
  np.testing.assert_array_equal(read.labels, masks)
  assert read.class_names == tuple(map(str, range(12)))  # The last is void.
