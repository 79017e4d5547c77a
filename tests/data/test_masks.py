"""Data sets with masks: what `prepare` writes, and what `data.load` and plain TFDS read."""

import struct
import zlib

import numpy as np
import pytest
from image_arrays import fails_in_one_line, image_pairs, png, save
from PIL import Image

from dfkd_jax import data
from dfkd_jax.data import images as data_images
from dfkd_jax.data import prepare


def write_tfds(folder, features, records):
  """Writes a data set with any features, as TFDS itself would."""
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  path = folder / 'tiny' / '1.0.0'
  path.mkdir(parents=True)
  writer = array_record_module.ArrayRecordWriter(
      str(path / 'tiny-test.array_record-00000-of-00001'), 'group_size:1')
  for record in records:
    example = tf_example_pb2.Example()
    for key, value in record.items():
      feature = example.features.feature[key]
      values = feature.bytes_list if isinstance(value, bytes) else feature.int64_list
      values.value.append(value)
    writer.write(example.SerializeToString())
  writer.close()
  info = tfds.core.DatasetInfo(
      builder=tfds.core.DatasetIdentity('tiny', tfds.core.Version('1.0.0'), str(path), ''),
      features=tfds.features.FeaturesDict(features))
  info.set_file_format('array_record')
  info.set_splits(tfds.core.SplitDict([tfds.core.SplitInfo(
      name='test', shard_lengths=[len(records)], num_bytes=1, filename_template=None)]))
  info.write_to_directory(path)


@pytest.mark.parametrize('dtype', [np.uint8, np.int64])
def test_arrays_are_read_back_by_load_and_by_plain_tfds(tmp_path, dtype):
  import tensorflow_datasets as tfds

  images, masks = image_pairs(7, 5, 9)
  masks[2], masks[3, 1, 4] = 255, 255
  folder = prepare.write('tiny', {'test': (images, masks.astype(dtype), {'id': np.arange(7)})},
                         tmp_path, class_names=list('abcdefghijk'))
  read = data.load('tiny', 'test', tmp_path, image_shape=(5, 9, 3))
  assert (read.labels.dtype, read.class_names) == (np.uint8, tuple('abcdefghijk'))
  np.testing.assert_array_equal(read.images, images)
  np.testing.assert_array_equal(read.labels, masks)
  builder = tfds.builder_from_directory(folder)
  feature = builder.info.features['segmentation_label']
  assert isinstance(feature, tfds.features.LabeledImage)
  assert (feature.shape, feature.encoding_format) == ((5, 9, 1), 'png')
  assert builder.info.supervised_keys == ('image', 'segmentation_label')
  source = tfds.data_source('tiny', split='test', data_dir=tmp_path, download=False)
  np.testing.assert_array_equal([row['segmentation_label'] for row in source], masks[..., None])
  assert [row['id'] for row in source] == list(range(7))


def test_shards_and_slices_keep_the_order(tmp_path, monkeypatch):
  monkeypatch.setattr(data_images, 'BATCH_SIZE', 3)
  images, masks = image_pairs(11, 4, 3)
  prepare.write('tiny', {'test': (images, masks)}, tmp_path)
  read = data.load('tiny', 'test[2:]', tmp_path, shard=(1, 2))
  np.testing.assert_array_equal(read.images, images[3::2])
  np.testing.assert_array_equal(read.labels, masks[3::2])


def test_names_are_the_numbers_up_to_the_highest_class_of_all_splits(tmp_path):
  train, test = image_pairs(3, 4, 5, highest=2), image_pairs(2, 4, 5, highest=1)
  test[1][1, 0, 0], train[1][0, 2, 3] = 6, 255
  prepare.write('tiny', {'train': train, 'test': test}, tmp_path)
  assert data.load('tiny', 'test', tmp_path).class_names == tuple('0123456')


def tfds_features():
  import tensorflow_datasets as tfds

  return tfds.features


@pytest.mark.parametrize(('keys', 'read', 'names'), [
    (['labels'], 'labels', ()), (['plain'], 'plain', ()),
    (['plain', 'named'], 'named', ('sky', 'road')), (['label'], 'label', ('sky', 'road')),
    (['labels', 'wide'], 'labels', ()),
])
def test_masks_of_other_data_sets_are_found(tmp_path, keys, read, names):
  features = tfds_features()
  kinds = {
      'labels': features.LabeledImage(labels=None, shape=(None, None, 1)),
      'named': features.LabeledImage(labels=['sky', 'road'], shape=(None, None, 1)),
      'label': features.LabeledImage(labels=['sky', 'road'], shape=(4, 3, 1)),
      'plain': features.Image(shape=(None, None, 1)),
      'wide': features.Image(shape=(None, None, 3))}
  images, masks = image_pairs(2, 4, 3, highest=255)
  others = {key: png(images[1] if key == 'wide' else masks[0] * 0) for key in keys}
  records = [{**others, 'image': png(image), read: png(mask)}
             for image, mask in zip(images, masks, strict=True)]
  write_tfds(tmp_path, {'image': features.Image(), **{key: kinds[key] for key in keys}}, records)
  loaded = data.load('tiny', 'test', tmp_path)
  np.testing.assert_array_equal(loaded.labels, masks)
  assert loaded.class_names == names


def test_of_classes_and_masks_those_asked_for_are_loaded(tmp_path):
  features = tfds_features()
  images, masks = image_pairs(2, 4, 3)
  write_tfds(
      tmp_path, {'image': features.Image(), 'label': features.ClassLabel(names=['cat', 'dog']),
                 'segmentation_mask': features.Image(shape=(None, None, 1))},
      [{'image': png(images[i]), 'segmentation_mask': png(masks[i]), 'label': 1 - i}
       for i in range(2)])
  read = data.load('tiny', 'test', tmp_path)
  assert (read.labels.tolist(), read.labels.dtype) == ([1, 0], np.int32)
  assert read.class_names == ('cat', 'dog')
  np.testing.assert_array_equal(data.load('tiny', 'test', tmp_path, masks=True).labels, masks)


def test_a_data_set_without_one_clear_mask_is_refused(tmp_path):
  features = tfds_features()
  images, masks = image_pairs(1, 4, 3)
  record = {'image': png(images[0]), 'a': png(masks[0]), 'b': png(masks[0])}
  for number, shape, dtype in ((1, (None, None, 1), np.uint8), (2, (None, None, 1), np.uint16),
                               (3, (None, None, 3), np.uint8)):
    kinds = {key: features.Image(shape=shape, dtype=dtype, encoding_format='png') for key in 'ab'}
    write_tfds(tmp_path / str(number), {'image': features.Image(), **kinds}, [record])
    with fails_in_one_line(r"has \['a', 'b', 'image'\], needs a uint8 image, and a label or one"):
      data.load('tiny', 'test', tmp_path / str(number))


def test_palettes_and_single_bits_are_indices(tmp_path):
  features = tfds_features()
  images, masks = image_pairs(3, 6, 5, highest=1)
  masks[1] = np.arange(30).reshape(6, 5) * 8
  modes = ('1', 'P', None)
  write_tfds(
      tmp_path, {'image': features.Image(), 'mask': features.Image(shape=(None, None, 1))},
      [{'image': png(images[i]), 'mask': png(masks[i], modes[i])} for i in range(3)])
  np.testing.assert_array_equal(data.load('tiny', 'test', tmp_path).labels, masks)


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_grey_levels_of_few_bits_are_indices(tmp_path, bits):
  values = (np.arange(12).reshape(3, 4) % 2**bits).astype(np.uint8)
  path = tmp_path / 'mask.png'
  path.write_bytes(grey_png(values, bits))
  np.testing.assert_array_equal(data_images.read_mask(path), values)


def grey_png(values, bits):
  """A grey PNG of 1 to 8 bits by the standard; Pillow writes 1 and 8 only."""
  rows = b''.join(b'\0' + np.packbits(
      np.unpackbits(row[:, None], axis=1)[:, 8 - bits:].ravel()).tobytes() for row in values)
  header = struct.pack('>IIBBBBB', *values.shape[::-1], bits, 0, 0, 0, 0)
  chunk = lambda kind, content: (
      struct.pack('>I', len(content)) + kind + content
      + struct.pack('>I', zlib.crc32(kind + content)))
  return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows))
          + chunk(b'IEND', b''))


@pytest.mark.parametrize(('wrong', 'message'), [
    (png(np.zeros((4, 3, 3), np.uint8)), 'its mode is RGB, must be grey or palette'),
    (png(np.zeros((3, 4), np.uint8)), 'its size is 3 x 4, must be 4 x 3, as its image'),
    (b'no image', 'cannot identify'),
    (png(np.arange(12, dtype=np.uint8).reshape(4, 3))[:48], 'truncated')],
    ids=['mode', 'size', 'text', 'cut'])
def test_a_mask_that_does_not_fit_is_named_by_its_row(tmp_path, wrong, message):
  features = tfds_features()
  images, masks = image_pairs(3, 4, 3)
  records = [{'image': png(images[i]), 'mask': png(masks[i])} for i in range(3)]
  records[1]['mask'] = wrong
  write_tfds(tmp_path, {
      'image': features.Image(), 'mask': features.Image(shape=(None, None, 1))}, records)
  for options in ({}, {'resize': True, 'image_shape': (4, 3, 3)}):
    with fails_in_one_line(f"Mask 1 of data set 'tiny' cannot be read: .*{message}"):
      data.load('tiny', 'test', tmp_path, **options)


def test_images_of_any_size_and_their_masks_are_resized(tmp_path):
  sizes = [(4, 6), (8, 3), (2, 2)]
  pairs = [image_pairs(1, *size, seed=i) for i, size in enumerate(sizes)]
  paths = [(save(tmp_path / f'{i}.png', images[0]), save(tmp_path / f'm{i}.png', masks[0]))
           for i, (images, masks) in enumerate(pairs)]
  images, masks = zip(*paths, strict=True)
  prepare.write('tiny', {'test': (prepare.Files(images), prepare.MaskFiles(masks))}, tmp_path / 'd')
  with fails_in_one_line(r'an image \(8, 3, 3\), must be \(4, 6, 3\)'):
    data.load('tiny', 'test', tmp_path / 'd')
  read = data.load('tiny', 'test', tmp_path / 'd', image_shape=(4, 6, 3), resize=True)
  assert read.labels.shape == (3, 4, 6)
  for i, (images, masks) in enumerate(pairs):
    expected = Image.fromarray(images[0]).resize((6, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(read.images[i], np.asarray(expected))
    # The nearest pixel by the centres, by hand.
    rows = ((np.arange(4) + 0.5) * sizes[i][0] / 4).astype(int)
    columns = ((np.arange(6) + 0.5) * sizes[i][1] / 6).astype(int)
    np.testing.assert_array_equal(read.labels[i], masks[0][rows][:, columns])


def test_images_with_classes_are_resized_too(tmp_path):
  images, _ = image_pairs(3, 5, 8)
  prepare.write('tiny', {'test': (images, np.arange(3))}, tmp_path)
  read = data.load('tiny', 'test', tmp_path, image_shape=(7, 4, 3), resize=True)
  expected = [Image.fromarray(image).resize((4, 7), Image.Resampling.BILINEAR) for image in images]
  np.testing.assert_array_equal(read.images, [np.asarray(image) for image in expected])


@pytest.mark.parametrize(('options', 'message'), [
    ({'crop': 0.5, 'image_shape': (2, 2, 3)}, "crop is 0.5, must be None for 'tiny'.* use resize"),
    ({'crop': 0.5, 'resize': True, 'image_shape': (2, 2, 3)}, 'crop is 0.5, must be None with re'),
    ({'resize': True}, r'image_shape is None, must be \(H, W, 1, 3 or 4\) with resize')])
def test_options_that_exclude_each_other(tmp_path, options, message):
  prepare.write('tiny', {'test': image_pairs(2, 4, 3)}, tmp_path)
  with fails_in_one_line(message):
    data.load('tiny', 'test', tmp_path, **options)
