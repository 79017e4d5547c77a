import os

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dfkd_jax import report


def read(path):
  with Image.open(path) as picture:
    assert picture.format == 'PNG'
    return np.asarray(picture.convert('RGB')).astype(int)


def test_grid_has_every_pixel_in_its_place(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (7, 5, 11, 3)).astype(np.uint8)
  report.image_grid(tmp_path / 'grid.png', images, [''] * 7, columns=3, scale=4)
  sheet = read(tmp_path / 'grid.png')
  height, width = sheet.shape[:2]
  assert width == 10 + 3 * (44 + 10)
  pitch, rest = divmod(height - 10, 3)
  assert rest == 0
  assert pitch > 20 + 10 + 8  # There is room for text.
  for index, image in enumerate(images):
    top, left = 10 + index // 3 * pitch, 10 + index % 3 * 54
    for y, x in ((0, 0), (4, 10), (2, 7)):
      patch = sheet[top + 4 * y : top + 4 * y + 4, left + 4 * x : left + 4 * x + 4]
      assert (patch == image[y, x]).all()
  assert (sheet[10 + 2 * pitch :, 64:] == 255).all()  # The last row has one image.


def test_grid_of_floats_and_of_grey_images(tmp_path):
  images = np.zeros((2, 3, 2, 1), np.float32)
  images[0, :, :, 0] = [[0, 1], [0.5, 2], [-1, np.nan]]
  report.image_grid(tmp_path / 'a.png', jnp.asarray(images), ['a', 'b'], scale=1)
  sheet = read(tmp_path / 'a.png')
  assert sheet[10:13, 10:12, 0].tolist() == [[0, 255], [128, 255], [0, 0]]
  assert (sheet[..., :1] == sheet).all()


def test_grid_has_the_labels_under_the_images_and_within_their_width(tmp_path):
  images = np.ones((4, 9, 9, 1))
  report.image_grid(tmp_path / 'a.png', images, ['Dress', '', 'W' * 60, 'é'], columns=2, scale=6)
  sheet = read(tmp_path / 'a.png')
  pitch = (sheet.shape[0] - 10) // 2
  dark = sheet.mean(-1) < 160
  for index, labelled in enumerate((True, False, True, True)):
    top, left = 10 + index // 2 * pitch + 54 + 1, 10 + index % 2 * 64
    assert dark[top : top + pitch - 56, left : left + 54].any() == labelled
  assert not dark[:, :9].any()
  assert not dark[:, 65:73].any()
  assert not dark[-8:].any()


def test_grid_chooses_a_readable_scale(tmp_path):
  report.image_grid(tmp_path / 'a.png', np.zeros((3, 28, 28, 1)), list('abc'))
  assert read(tmp_path / 'a.png').shape[1] == 10 + 3 * (84 + 10)
  report.image_grid(tmp_path / 'a.png', np.zeros((3, 224, 224, 3)), list('abc'), columns=2)
  assert read(tmp_path / 'a.png').shape[1] == 10 + 2 * (224 + 10)


@pytest.mark.parametrize(
  ('images', 'options', 'message'),
  [
    (np.zeros((2, 3, 4)), {}, r'shape \(2, 3, 4\)'),
    (np.zeros((2, 3, 4, 2)), {}, r'1 or 3'),
    (np.zeros((0, 3, 4, 3)), {}, r'non-empty'),
    (np.zeros((2, 3, 4, 3), np.int32), {}, 'Images are int32'),
    (np.zeros((3, 3, 4, 3)), {}, '2 labels for 3 images'),
  ],
)
def test_grid_refuses_what_is_no_picture(tmp_path, images, options, message):
  with pytest.raises(ValueError, match=message):
    report.image_grid(tmp_path / 'a.png', images, ['a', 'b'], **options)
  assert not os.listdir(tmp_path)


def test_masks_have_a_colour_for_each_class_and_a_legend(tmp_path):
  masks = np.arange(24, dtype=np.uint8).reshape(1, 4, 6) % 12
  colored = report.color_masks(masks)
  assert colored.shape == (1, 4, 6, 3)
  of_class = {tuple(colored[masks == label][0]) for label in range(12)}
  assert len(of_class) == 12
  for label in range(12):
    assert (colored[masks == label] == colored[masks == label][0]).all()
  report.image_grid(tmp_path / 'a.png', colored, ['mask'], scale=20)
  report.image_grid(tmp_path / 'b.png', colored, ['mask'], scale=20,
                    classes=[f'class {label}' for label in range(12)])
  plain, legend = read(tmp_path / 'a.png'), read(tmp_path / 'b.png')
  assert legend.shape[0] > plain.shape[0]
  np.testing.assert_array_equal(legend[:plain.shape[0]], plain)
  below = {tuple(pixel) for pixel in legend[plain.shape[0]:].reshape(-1, 3)}
  assert of_class <= below
