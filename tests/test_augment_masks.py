"""Augmentations of images together with their masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax import augment

SHIFTS = {  # Augmentations that move pixels and blend none.
    **{name: {} for name in ('none', 'crop', 'flip', 'crop_and_flip', 'roll_and_flip')},
    'random_crop': {'size': (7, 9)}, 'random_crop_and_flip': {'size': (13, 4)}}


def with_masks(view, images, masks, **options):
  view = functools.partial(augment.with_masks, view, **options)
  return jax.jit(view)(jax.random.key(5), images, masks)


@pytest.mark.parametrize('name', SHIFTS)
@pytest.mark.parametrize('ignore', [255, 6, 0, 2, -1])
def test_masks_move_with_the_images(name, ignore):
  """Pixels carry their number, so that each one in the result is found in the mask."""
  view = augment.create(name, **SHIFTS[name])
  images = jnp.arange(1.0, 1 + 9 * 12 * 10).reshape(9, 12, 10, 1)
  masks = np.random.default_rng(1).integers(0, 4, (9, 12, 10))
  masks[:, 3:5, 2:4], masks[4] = ignore, ignore
  moved, labels = with_masks(view, images, masks, num_classes=4, ignore=ignore)
  np.testing.assert_array_equal(moved, jax.jit(view)(jax.random.key(5), images))
  assert (labels.dtype, labels.shape) == (np.int32, moved.shape[:3])
  expected = np.concatenate([[ignore], masks.ravel()])[np.asarray(moved[..., 0], int)]
  np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', ['resized_crop', 'resized_crop_and_flip'])
def test_a_pixel_has_the_class_that_outweighs_the_others(name, dtype):
  """Each class apart as an image of its own. Images are as without masks, bit for bit."""
  draw = np.random.default_rng(2)
  images = jnp.asarray(draw.random((7, 12, 10, 3)), dtype)
  masks = draw.integers(0, 5, (7, 6, 5)).repeat(2, axis=1).repeat(2, axis=2).astype(np.uint8)
  masks[masks == 4] = 255
  view = jax.jit(augment.create(name))
  moved, labels = with_masks(view, images, masks, num_classes=4, ignore=255)
  np.testing.assert_array_equal(moved, view(jax.random.key(5), images))
  shares = np.stack([
      view(jax.random.key(5), jnp.asarray(masks == label, jnp.float32)[..., None])[..., 0]
      for label in range(4)])
  largest, second = np.sort(shares, axis=0)[[-1, -2]]
  known = shares.sum(axis=0)
  is_clear = (np.abs(known - 0.5) > 1e-4) & ((largest - second > 1e-4) | (known < 0.5))
  assert is_clear.mean() > 0.9
  expected = np.where(known >= 0.5, shares.argmax(axis=0), 255)
  np.testing.assert_array_equal(labels[is_clear], expected[is_clear])
  assert set(np.unique(labels)) == {0, 1, 2, 3, 255}


@pytest.mark.parametrize(('first', 'columns', 'ignore', 'expected'), [
    # Positions 0, 1/3, 2/3 and 1 from the first column.
    (0, 2, 255, [0, 0, 2, 2]), (1, 2, 255, [2, 2, 255, 255]), (2, 2, 1, [1, 1, 1, 1]),
    (2, 2, 255, [255, 255, 1, 1]), (0, 4, 2, [0, 2, 255, 1])])
def test_enlarged_masks_by_hand(first, columns, ignore, expected):
  def view(key, images):
    return augment.resize_boxes(images, jnp.array([[0, first]]), jnp.array([[1, columns]]))

  masks = np.array([[[0, 2, 255, 1]]])
  _, labels = with_masks(view, jnp.ones((1, 1, 4, 3)), masks, num_classes=3, ignore=ignore)
  expected = [ignore if label == 255 else label for label in expected]
  np.testing.assert_array_equal(labels, [[expected]])


def test_unlabelled_pixels_win_over_no_class():
  """Halves and quarters of the pixels around; the lowest class wins a tie."""
  def view(key, images):
    return augment.resize_boxes(images, jnp.zeros((1, 2)), jnp.full((1, 2), 2))

  masks = np.array([[[0, 1, 9], [2, 3, 9], [9, 9, 9]]])
  for ignore, (first, second) in {0: (1, 2), 3: (0, 0), 1: (0, 0)}.items():
    _, labels = with_masks(view, jnp.ones((1, 3, 3, 1)), masks, num_classes=4, ignore=ignore)
    assert (int(labels[0, 0, 1]), int(labels[0, 1, 0])) == (first, second)
    assert int(labels[0, 1, 1]) == (1 if ignore == 0 else 0)
    np.testing.assert_array_equal(labels[0, ::2, ::2], masks[0, :2, :2])
