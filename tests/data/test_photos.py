"""`data.load` on images that differ in size."""

import io

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from configs import common
from dfkd_jax import data
from dfkd_jax.config import build
from dfkd_jax.config.check import check_values
from dfkd_jax.config.problems import raise_problems
from dfkd_jax.config.records import resolve
from dfkd_jax.data import images as data_images
from dfkd_jax.data import prepare
from dfkd_jax.data.prepare import writer as prepare_writer


def photo(width, height, mode='RGB', seed=0):
  """Smooth colours, as photos have, and some noise."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
  coarse = coarse.resize((width, height), Image.Resampling.BICUBIC)
  pixels = np.asarray(coarse, np.int16) + rng.integers(-9, 10, (height, width, 3))
  return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image, form='png', **options):
  stream = io.BytesIO()
  image.save(stream, form, **options)
  return stream.getvalue()


def written(folder, images, form='png'):
  """Writes a data set 'tiny' of images, with labels 0, 1, ..."""
  for i, image in enumerate(images):
    (folder / f'{i}.{form}').write_bytes(encoded(image, form))
  files = prepare.Files([folder / f'{i}.{form}' for i in range(len(images))])
  prepare.write('tiny', {'test': (files, np.arange(len(images)))}, folder / 'd')
  return folder / 'd'


def fails_in_one_line(match):
  return pytest.raises(ValueError, match=rf'\A(?!.*\n).*{match}')


# By hand: the size after resizing, and the box cut out of it.
CASES = {
    # int(16 * 50 / 31) = 25, (25 - 14) / 2 = 5.5, to even: 6
    'landscape': ((50, 31), (25, 16), (6, 1, 20, 15)),
    'portrait': ((23, 47), (16, 32), (1, 9, 15, 23)),  # int(16 * 47 / 23) = 32
    'square': ((40, 40), (16, 16), (1, 1, 15, 15)),
    # int(16 * 11 / 9) = 19, (19 - 14) / 2 = 2.5, to even: 2
    'small': ((9, 11), (16, 19), (1, 2, 15, 16)),
    'as resized': ((16, 21), (16, 21), (1, 4, 15, 18)),  # (21 - 14) / 2 = 3.5, to even: 4
}


def test_resized_and_cropped_as_by_hand(tmp_path):
  images = {case: photo(*size, seed=i) for i, (case, (size, *_)) in enumerate(CASES.items())}
  folder = written(tmp_path, images.values())
  read = data.load('tiny', 'test', folder, image_shape=(14, 14, 3), crop=0.875)
  assert (read.images.dtype, read.labels.tolist()) == (np.uint8, [0, 1, 2, 3, 4])
  for (case, (_, resized, box)), image in zip(CASES.items(), read.images, strict=True):
    expected = images[case].resize(resized, Image.Resampling.BILINEAR).crop(box)
    np.testing.assert_array_equal(image, np.asarray(expected), case)


def test_the_short_side_covers_an_oblong_crop(tmp_path):
  image = photo(30, 20)
  read = data.load('tiny', 'test', written(tmp_path, [image]), image_shape=(5, 9, 3), crop=0.75)
  expected = image.resize((18, 12), Image.Resampling.BILINEAR).crop((4, 4, 13, 9))  # 3.5 to even: 4
  np.testing.assert_array_equal(read.images, np.asarray(expected)[None])


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)), crop=st.floats(0.3, 1.0))
def test_any_size_becomes_that_asked_for_and_keeps_one_colour(size, shape, crop):
  raw = encoded(Image.new('RGB', size, (7, 130, 250)))
  image = data_images.decode_image(raw, 3, (*shape, 3), crop)
  assert image.shape == (*shape, 3)
  colour = np.array([7, 130, 250], np.uint8)
  np.testing.assert_array_equal(image, np.broadcast_to(colour, image.shape))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(size=st.tuples(st.integers(6, 40), st.integers(6, 40)).map(sorted))
def test_of_the_long_side_the_middle_is_kept(size):
  """A ramp along the long side: both ends are cut alike, to a pixel."""
  short, long = size
  ramp = np.tile(np.arange(long, dtype=np.uint8), (short, 1))
  image = data_images.decode_image(encoded(Image.fromarray(ramp)), 1, (short, short, 1), 1.0)
  middle = image[..., 0].astype(int)
  np.testing.assert_array_equal(middle, np.tile(np.arange(short) + middle[0, 0], (short, 1)))
  assert abs(middle[0, 0] - (long - 1 - middle[0, -1])) <= 1


def test_antialiased_where_it_shrinks():
  """A chessboard of single pixels becomes grey, not black or white."""
  board = np.array(np.indices((64, 48)).sum(0) % 2 * 255, np.uint8)
  image = data_images.decode_image(encoded(Image.fromarray(board)), 3, (12, 12, 3), 1.0)
  np.testing.assert_allclose(image, 127.5, atol=2)


def test_grey_alpha_palette_and_cmyk_become_rgb(tmp_path):
  decode = lambda raw: data_images.decode_image(raw, 3, (11, 11, 3), 0.9)
  colour = photo(21, 13)
  with_alpha = Image.merge('RGBA', (*colour.split(), photo(21, 13, 'L', seed=1)))
  palette = colour.quantize(16)
  palette.info['transparency'] = bytes(range(16))
  images = [photo(21, 13, 'L'), with_alpha, palette, photo(21, 13, 'LA'), photo(21, 13, '1')]
  expected = [
      images[0].convert('RGB'), colour, colour.quantize(16).convert('RGB'),
      images[3].convert('L').convert('RGB'), images[4].convert('RGB')]
  for image, rgb in zip(images, expected, strict=True):
    np.testing.assert_array_equal(decode(encoded(image)), decode(encoded(rgb)), image.mode)
  cmyk = decode(encoded(photo(21, 13, 'CMYK'), 'jpeg', quality=100))
  assert np.abs(cmyk - decode(encoded(colour)).astype(int)).mean() < 4


def test_a_grey_data_set_is_read_in_colour_if_asked_for(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (3, 7, 5, 1), np.uint8)
  prepare.write('tiny', {'test': (images, np.arange(3))}, tmp_path)
  read = data.load('tiny', 'test', tmp_path, image_shape=(5, 5, 3), crop=1.0)
  np.testing.assert_array_equal(read.images, np.repeat(images[:, 1:6], 3, axis=-1))


def test_what_is_not_turned_into_the_channels_asked_for():
  with fails_in_one_line('RGB cannot be converted to L'):
    data_images.decode_image(encoded(photo(5, 6)), 1, (4, 4, 1), 1.0)
  deep = Image.fromarray(np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000)
  with fails_in_one_line('cannot be converted to RGB'):
    data_images.decode_image(encoded(deep), 3, (4, 4, 3), 1.0)


def test_threads_keep_the_order_and_shards_share_it_out(tmp_path, monkeypatch):
  """Sizes differ a lot, so that threads finish in another order."""
  monkeypatch.setattr(data_images, 'BATCH_SIZE', 7)
  monkeypatch.setattr(data_images.os, 'cpu_count', lambda: 5)
  values = range(0, 250, 11)
  images = [Image.new('RGB', (900, 700) if i % 3 == 0 else (9, 8), (value, value, value))
            for i, value in enumerate(values)]
  folder = written(tmp_path, images)
  whole = data.load('tiny', 'test', folder, image_shape=(4, 4, 3), crop=0.875)
  assert whole.images[:, 2, 1, 0].tolist() == list(values)
  assert whole.labels.tolist() == list(range(23))
  for count in (2, 5):
    for index in range(count):
      read = data.load('tiny', 'test[1:]', folder, image_shape=(4, 4, 3), crop=0.875,
                       shard=(index, count))
      assert read.images[:, 0, 0, 2].tolist() == list(values)[1:][index::count]
      assert read.labels.tolist() == list(range(1, 23))[index::count]


def test_sizes_that_differ_need_a_crop(tmp_path):
  folder = written(tmp_path, [photo(9, 8), photo(7, 8), photo(9, 8)])
  with fails_in_one_line(r'image \(8, 7, 3\), must be \(8, 9, 3\), the shape of the first'):
    data.load('tiny', 'test', folder)
  with fails_in_one_line(r'image \(8, 7, 3\), must be \(8, 9, 3\), image_shape'):
    data.load('tiny', 'test', folder, image_shape=(8, 9, 3))
  assert data.load('tiny', 'test', folder, shard=(0, 2)).images.shape == (2, 8, 9, 3)


@pytest.mark.parametrize(('options', 'message'), [
    ({'crop': 0.0, 'image_shape': (4, 4, 3)}, r'crop is 0.0, must be in \(0, 1\]'),
    ({'crop': 1.5, 'image_shape': (4, 4, 3)}, 'crop is 1.5'),
    ({'crop': 0.9}, 'image_shape is None'),
    ({'crop': 0.9, 'image_shape': (4, 4, 2)}, r'image_shape is \(4, 4, 2\)'),
    ({'shard': (2, 2)}, r'shard is \(2, 2\), must be'),
    ({'shard': (3, 4)}, r"'test' of 'tiny' has no image for shard \(3, 4\)"),
])
def test_arguments_that_do_not_fit(tmp_path, options, message):
  prepare.write('tiny', {'test': (np.zeros((3, 4, 5, 3), np.uint8), np.arange(3))}, tmp_path)
  with fails_in_one_line(message):
    data.load('tiny', 'test', tmp_path, **options)


def test_a_damaged_image_is_counted_out(tmp_path, monkeypatch):
  raw = [encoded(photo(90, 80, seed=i)) for i in range(4)]
  raw[2] = raw[2][:len(raw[2]) // 2]

  monkeypatch.setattr(prepare_writer, 'encode_file', raw.__getitem__)
  prepare.write('tiny', {'test': (prepare.Files(range(4)), np.arange(4))}, tmp_path)
  with fails_in_one_line("Image 2 of data set 'tiny' cannot be read: .*truncated"):
    data.load('tiny', 'test', tmp_path, image_shape=(8, 8, 3), crop=0.5)


def test_a_run_crops_as_its_config_says(tmp_path):
  folder = written(tmp_path, [photo(30, 20), photo(17, 23)])
  config = common.base()
  config.dataset.update(
      name='tiny', data_dir=str(folder), image_shape=(8, 8, 3), num_classes=2, crop=0.5)
  settings = resolve(config)
  read = build.load_split(settings.dataset, settings.task, 'test')
  expected = photo(30, 20).resize((24, 16), Image.Resampling.BILINEAR).crop((8, 4, 16, 12))
  np.testing.assert_array_equal(read.images[0], np.asarray(expected))
  config.dataset.crop = 1.25
  with fails_in_one_line(r'dataset.crop is 1.25, must be a number in \(0, 1\] or None'):
    raise_problems(check_values, config)
