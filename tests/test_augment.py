"""Augmentations: reference values, brute force, laws of chance, and every transformation of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_jax import augment

SIZES = {'random_crop': (7, 9), 'random_crop_and_flip': (13, 4)}  # of images of 12 x 10
NAMES = [
    'none', 'crop', 'flip', 'crop_and_flip', 'resized_crop', 'resized_crop_and_flip',
    'roll_and_flip', *SIZES]


def create(name):
  return augment.create(name, **({'size': SIZES[name]} if name in SIZES else {}))


def ramp(*shape):
  """Images [B, H, W, C] with unique pixels above 0."""
  return jnp.arange(1, 1 + np.prod(shape), dtype=jnp.float32).reshape(shape)


def nhwc(array):
  return jnp.asarray(array).transpose(0, 2, 3, 1)


def test_crop_and_flip_match_reference():
  g = golden('aug')
  def view(images):
    return augment.flip_where(
        augment.crop_at(images, jnp.asarray(g['crop_xy']), 4), jnp.asarray(g['flip']))
  out, pull = jax.vjp(jax.jit(view), nhwc(g['x']))
  np.testing.assert_array_equal(out, nhwc(g['flipped']))
  std = g['normaliser/std_cifar10'].astype(np.float32)
  np.testing.assert_allclose(pull(nhwc(g['cot']) / std)[0], nhwc(g['grad_x']), rtol=1e-6)
  if 'cropped' in g:
    np.testing.assert_array_equal(
        augment.crop_at(nhwc(g['x']), jnp.asarray(g['crop_xy']), 4), nhwc(g['cropped']))


cut = jax.jit(augment.crop_at, static_argnums=2)


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([0, 1, 4]), st.integers(0, 2**31))
def test_crop_at_equals_a_slice_of_the_padded_image(pad, seed):
  images = ramp(3, 5, 7, 2)
  offsets = np.random.default_rng(seed).integers(0, 2 * pad + 1, (3, 2))
  padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  expected = [image[y:y + 5, x:x + 7] for image, (x, y) in zip(padded, offsets, strict=True)]
  np.testing.assert_array_equal(cut(images, jnp.asarray(offsets), pad), expected)


def test_crop_keeps_the_gradient_of_what_it_keeps():
  images = ramp(6, 5, 7, 2)
  grad = jax.grad(lambda x: augment.crop(jax.random.key(0), x, 3).sum())(images)
  kept = augment.crop(jax.random.key(0), images, 3)
  assert set(np.unique(grad)) == {0, 1}
  np.testing.assert_array_equal(np.sort(images[grad == 1]), np.sort(kept[kept > 0]))


def test_crop_draws_every_offset_equally_often_and_apart():
  image = jnp.zeros((1, 9, 9, 1)).at[:, 4, 4].set(1)  # One bright pixel shows the offset.
  cropped = augment.crop(jax.random.key(0), jnp.repeat(image, 8100, axis=0), 4)
  counts = np.asarray(cropped.sum(axis=(0, 3)))
  assert counts.sum() == 8100
  expected = 100
  assert ((counts - expected) ** 2 / expected).sum() < 125  # Chi-square with 80 degrees, p = 0.001.


def test_flip_draws_for_each_image():
  images = ramp(2000, 2, 3, 1)
  flipped = np.asarray(augment.flip(jax.random.key(0), images))
  mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
  assert ((flipped == images).all(axis=(1, 2, 3)) ^ mirrored).all()
  assert 900 < mirrored.sum() < 1100


def test_crop_and_flip_is_a_crop_then_a_flip():
  images = ramp(40, 5, 7, 2)
  out = np.asarray(jax.jit(augment.create('crop_and_flip', pad=1))(jax.random.key(0), images))
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  seen = set()
  for image, source in zip(out, padded, strict=True):
    views = {
        (y, x, d): source[y:y + 5, x:x + 7][:, ::d] for y in range(3) for x in range(3)
        for d in (1, -1)}
    seen.update(which := [place for place, view in views.items() if (view == image).all()])
    assert len(which) == 1
  assert len(seen) > 10


def test_random_crop_cuts_every_box_equally_often():
  images = ramp(3000, 4, 5, 1)
  boxes = np.asarray(augment.random_crop(jax.random.key(0), images, size=(3, 2)))
  assert boxes.shape == (3000, 3, 2, 1)
  corners = boxes[:, 0, 0, 0] - np.asarray(images)[:, 0, 0, 0]
  np.testing.assert_array_equal(
      boxes[..., 0] - boxes[:, :1, :1, 0], np.tile([[0, 1], [5, 6], [10, 11]], (3000, 1, 1)))
  places, counts = np.unique(corners, return_counts=True)
  assert places.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
  assert ((counts - 375) ** 2 / 375).sum() < 24.3  # Chi-square with 7 degrees, p = 0.001.


def test_random_crop_pads_small_images_at_the_right_and_bottom():
  images = ramp(30, 4, 5, 2)
  boxes = np.asarray(augment.random_crop(jax.random.key(1), images, size=(6, 3)))
  padded = np.pad(images, ((0, 0), (0, 2), (0, 0), (0, 0)))
  first = [next(x for x in range(3) if (image[:, x:x + 3] == box).all())
           for image, box in zip(padded, boxes, strict=True)]
  assert set(first) == {0, 1, 2}
  whole = augment.random_crop(jax.random.key(1), images, size=(6, 7))
  np.testing.assert_array_equal(whole, np.pad(images, ((0, 0), (0, 2), (0, 2), (0, 0))))
  flipped = np.asarray(augment.random_crop_and_flip(jax.random.key(1), images, size=(4, 5)))
  mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
  assert 5 < mirrored.sum() < 25
  assert (mirrored ^ (flipped == images).all(axis=(1, 2, 3))).all()


def test_roll_and_flip_is_one_draw_for_the_batch():
  images = ramp(4, 6, 7, 2)
  rolled, view = set(), jax.jit(augment.create('roll_and_flip', pixels=1))
  for seed in range(60):
    out = np.asarray(view(jax.random.key(seed), images))
    which = [
        (y, x, d) for y in (-1, 0, 1) for x in (-1, 0, 1) for d in (1, -1)
        if (np.roll(images, (y, x), (1, 2))[:, :, ::d] == out).all()]
    assert len(which) == 1
    rolled.add(which[0])
  assert len(rolled) > 13  # Of 18.


def brute_resize(image, corner, size, align_corners):
  """Bilinear, one pixel at a time; beyond the box its border counts."""
  out = np.zeros_like(image)
  for place in np.ndindex(image.shape[:2]):
    lows, parts = [], []
    for i, axis in zip(place, (0, 1), strict=True):
      n, h = image.shape[axis], size[axis]
      at = i * (h - 1) / max(n - 1, 1) if align_corners else (i + 0.5) * h / n - 0.5
      at = min(max(at, 0), h - 1)
      lows.append((corner[axis] + int(at), corner[axis] + min(int(at) + 1, h - 1)))
      parts.append(at - int(at))
    (y0, y1), (x0, x1), (v, u) = *lows, parts
    upper = (1 - u) * image[y0, x0] + u * image[y0, x1]
    out[place] = (1 - v) * upper + v * ((1 - u) * image[y1, x0] + u * image[y1, x1])
  return out


resize = jax.jit(augment.resize_boxes, static_argnames='align_corners')


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_resize_boxes_equals_brute_force(seed, align_corners):
  rng = np.random.default_rng(seed)
  images = rng.random((3, 6, 9, 2), np.float32)
  sizes = np.stack([rng.integers(1, 7, 3), rng.integers(1, 10, 3)], -1)
  corners = rng.integers(0, [6, 9] - sizes + 1)
  out = resize(images, jnp.asarray(corners), jnp.asarray(sizes), align_corners=align_corners)
  expected = [
      brute_resize(*args, align_corners) for args in zip(images, corners, sizes, strict=True)]
  np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize('align_corners', [True, False])
def test_resized_crop_of_everything_changes_nothing(align_corners):
  images = jax.random.uniform(jax.random.key(1), (3, 6, 6, 2))
  view = jax.jit(
      augment.create(
          'resized_crop', scale=(1.0, 1.0), ratio=(1.0, 1.0), align_corners=align_corners))
  out = view(jax.random.key(0), images)
  np.testing.assert_allclose(out, images, atol=1e-6)


def test_resized_crop_draws_boxes_within_their_bounds():
  height, width = 24, 31
  rows, columns = jnp.meshgrid(jnp.arange(float(height)), jnp.arange(float(width)), indexing='ij')
  # Pixels know their place.
  images = jnp.broadcast_to(jnp.stack([rows, columns], -1), (3000, height, width, 2))
  view = jax.jit(augment.create('resized_crop', scale=(0.25, 0.8), ratio=(0.5, 2.0)))
  out = np.asarray(view(jax.random.key(0), images))
  first, last = out[:, 0, 0], out[:, -1, -1]
  sizes = last - first + 1
  assert first.min() > -1e-3
  assert (last.max(0) < [height - 1 + 1e-3, width - 1 + 1e-3]).all()
  area, ratio = sizes.prod(1) / (height * width), sizes[:, 1] / sizes[:, 0]
  assert 0.22 < area.min() < 0.3
  assert 0.7 < area.max() < 0.84
  assert 0.45 < ratio.min() < 0.6
  assert 1.7 < ratio.max() < 2.2
  assert len(np.unique(np.round(first), axis=0)) > 100
  np.testing.assert_allclose(sizes, np.round(sizes), atol=1e-3)


def test_resized_crop_that_cannot_fit_is_cut_down():
  images = ramp(4, 6, 8, 1)
  # 3.5 by 13.9 in 6 by 8.
  view = jax.jit(augment.create('resized_crop', scale=(1.0, 1.0), ratio=(4.0, 4.0)))
  out = view(jax.random.key(0), images)
  assert np.isfinite(out).all()
  np.testing.assert_allclose(
      np.asarray(out)[..., 0, -1, 0] - np.asarray(out)[..., 0, 0, 0], 7, atol=1e-3)


@pytest.mark.parametrize('name', NAMES)
def test_every_transformation_of_jax_applies(name):
  view = create(name)

  @jax.jit
  def transformed(to_scan, to_vmap, to_differentiate, key, images):
    scanned = jax.lax.scan(lambda _, key: (0, view(key, images)), 0, to_scan)[1]
    vmapped = jax.vmap(view, (0, None))(to_vmap, images)
    grad = jax.grad(lambda x: jnp.square(jax.vmap(view, (0, None))(to_differentiate, x)).sum())(
        images)
    return scanned, vmapped, grad, view(key, images.astype(jnp.bfloat16))

  keys = lambda: jax.random.split(jax.random.key(0), 2)
  images = np.random.default_rng(0).random((3, 12, 10, 2), np.float32)
  scanned, vmapped, grad, half = transformed(keys(), keys(), keys(), keys()[0], images)
  np.testing.assert_allclose(scanned, vmapped, atol=1e-6)
  assert vmapped.min() >= 0
  assert vmapped.max() <= 1 + 1e-6
  assert grad.shape == images.shape
  assert np.isfinite(grad).all()
  assert (grad != 0).any()
  shape = (3, *SIZES.get(name, (12, 10)), 2)
  assert (half.dtype, half.shape) == (jnp.bfloat16, shape)
  np.testing.assert_allclose(half.astype(jnp.float32), vmapped[0], atol=0.02)


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'none'])
def test_keys_decide(name):
  view = jax.jit(create(name))
  first, again, other = (
      np.asarray(view(jax.random.key(seed), ramp(9, 12, 10, 2))) for seed in (0, 0, 3))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_create_takes_options_and_names_what_is_wrong():
  images = ramp(2, 5, 7, 1)
  with_option = augment.create('crop_and_flip', pad=1)(jax.random.key(0), images)
  np.testing.assert_array_equal(
      with_option, augment.crop_and_flip(jax.random.key(0), images, pad=1))
  np.testing.assert_array_equal(augment.create('none')(jax.random.key(0), images), images)
  with pytest.raises(ValueError, match=r"'crop_and_filp'.*Did you mean 'crop_and_flip'"):
    augment.create('crop_and_filp')
  with pytest.raises(ValueError, match=r"Unknown option of 'crop' 'padding'\..* Known: pad\."):
    augment.create('crop', padding=4)
  cropped = augment.create('random_crop', size=(3, 2))(jax.random.key(0), images)
  assert cropped.shape == (2, 3, 2, 1)
  with pytest.raises(ValueError, match=r"Unknown option of 'flip' 'images'\."):
    augment.create('flip', images=images)
