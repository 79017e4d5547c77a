"""Random augmentations of images [B, H, W, C]: key first, pure, differentiable, dtype kept.

Each draws anew for every image, except `roll_and_flip`, which draws once per batch. Images are in
[0, 1], and pixels outside of an image are black.
"""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dfkd_jax.messages import check_choice
from dfkd_jax.types import Array, PRNGKey

_ATTEMPTS = 10  # Boxes drawn per resized crop, as in torchvision.
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def create(name: str, **options) -> Callable[[PRNGKey, Array], Array]:
  """Makes an augmentation (key, images) -> images by name, for configs.

  Args:
    name: 'none', or the name of a function of this file that takes a key.
    **options: Further arguments of that function.

  Raises:
    ValueError: The name is unknown, or it has no such option.
  """
  function = _BY_NAME[check_choice(name, _BY_NAME, 'augmentation')]
  allowed = list(inspect.signature(function).parameters)[2:]
  for option in options:
    if option not in allowed:
      raise ValueError(f'augmentation {name!r} has no option {option!r}; it has {allowed}.')
  return functools.partial(function, **options)


def identity(key: PRNGKey, images: Array) -> Array:
  """Returns the images."""
  del key
  return images


def crop(key: PRNGKey, images: Array, pad: int = 4) -> Array:
  """Pads by `pad` black pixels, then cuts each image at one of (2 pad + 1)^2 offsets."""
  return crop_at(images, jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1), pad)


shift = crop  # The usual name where flips would change the class, as with digits.


def flip(key: PRNGKey, images: Array) -> Array:
  """Mirrors each image left to right with probability 1/2."""
  return flip_where(images, jax.random.bernoulli(key, shape=images.shape[:1]))


def crop_and_flip(key: PRNGKey, images: Array, pad: int = 4) -> Array:
  """`crop`, then `flip`: for CIFAR-sized images, in synthesis and in distillation."""
  crop_key, flip_key = jax.random.split(key)
  return flip(flip_key, crop(crop_key, images, pad))


def resized_crop(
    key: PRNGKey, images: Array, scale: tuple[float, float] = _SCALE,
    ratio: tuple[float, float] = _RATIO, align_corners: bool = True,
) -> Array:
  """Resizes a box of random area and shape from each image to full size.

  GoogLeNet's crop (arXiv:1409.4842) as in torchvision: the first of ten boxes that fits in the
  image. If none fits, the first box is cut down to the image.

  Args:
    key: PRNG key.
    images: [B, H, W, C].
    scale: Bounds of the box's share of the image's area.
    ratio: Bounds of width / height, drawn log-uniformly.
    align_corners: See `resize_boxes`.

  Returns:
    [B, H, W, C].
  """
  area_key, ratio_key, place_key = jax.random.split(key, 3)
  count, limits = images.shape[0], jnp.asarray(images.shape[1:3], jnp.float32)
  draw = functools.partial(jax.random.uniform, shape=(_ATTEMPTS, count), dtype=jnp.float32)
  areas = draw(area_key, minval=scale[0], maxval=scale[1]) * limits.prod()
  ratios = jnp.exp(draw(ratio_key, minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1])))
  sizes = jnp.round(jnp.sqrt(jnp.stack([areas / ratios, areas * ratios], axis=-1)))
  fits = jnp.all((sizes >= 1) & (sizes <= limits), axis=-1)
  sizes = jnp.clip(sizes[jnp.argmax(fits, axis=0), jnp.arange(count)], 1, limits)
  positions = jax.random.uniform(place_key, (count, 2), jnp.float32)
  corners = jnp.minimum(jnp.floor(positions * (limits - sizes + 1)), limits - sizes)
  return resize_boxes(images, corners, sizes, align_corners=align_corners)


def resized_crop_and_flip(
    key: PRNGKey, images: Array, scale: tuple[float, float] = _SCALE,
    ratio: tuple[float, float] = _RATIO, align_corners: bool = True,
) -> Array:
  """`resized_crop`, then `flip`: for ImageNet-sized images, and CMI's local view."""
  crop_key, flip_key = jax.random.split(key)
  return flip(flip_key, resized_crop(crop_key, images, scale, ratio, align_corners))


def roll_and_flip(key: PRNGKey, images: Array, pixels: int = 4) -> Array:
  """Rolls the batch by up to `pixels` on both axes, and mirrors it with probability 1/2.

  DeepInversion's jitter.
  """
  roll_key, flip_key = jax.random.split(key)
  offsets = jax.random.randint(roll_key, (2,), -pixels, pixels + 1)
  images = jnp.roll(images, offsets, axis=(1, 2))
  flag = jax.random.bernoulli(flip_key)
  return flip_where(images, jnp.broadcast_to(flag, images.shape[:1]))


def crop_at(images: Array, offsets_xy: Array, pad: int) -> Array:
  """Pads images by zeros, then cuts each at its offset.

  Args:
    images: [B, H, W, C].
    offsets_xy: [B, 2] integers in 0..2*pad, column then row in the padded image. An offset of
      `pad` leaves the image unchanged.
    pad: Width of the border.

  Returns:
    [B, H, W, C].
  """
  padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  cut = lambda image, offset: lax.dynamic_slice(image, (offset[1], offset[0], 0), images.shape[1:])
  return jax.vmap(cut)(padded, offsets_xy)


def flip_where(images: Array, flags: Array) -> Array:
  """Mirrors images [B, H, W, C] left to right where `flags` [B] is true."""
  return jnp.where(flags.astype(bool)[:, None, None, None], images[:, :, ::-1], images)


def resize_boxes(
    images: Array, corners: Array, sizes: Array, *, align_corners: bool = True) -> Array:
  """Bilinear interpolation of a box of each image to the image's size.

  Args:
    images: [B, H, W, C] float.
    corners: [B, 2] first row and column of each box.
    sizes: [B, 2] rows and columns of each box, at least 1.
    align_corners: Whether the centres of the outer pixels of box and result coincide. Otherwise
      their outer edges do.

  Returns:
    [B, H, W, C].
  """
  dtype, (height, width) = images.dtype, images.shape[1:3]
  rows = _pixel_weights(corners[:, 0], sizes[:, 0], height, align_corners).astype(dtype)
  columns = _pixel_weights(corners[:, 1], sizes[:, 1], width, align_corners).astype(dtype)
  # Matrix products, since their gradient needs no scatter; in full precision, as in resizing.
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  return product('bvw,bhwc->bhvc', columns, product('buh,bhwc->buwc', rows, images))


def _pixel_weights(first: Array, size: Array, length: int, align_corners: bool) -> Array:
  """Weight of each source pixel in each pixel of the result: [B, length, length]."""
  steps = jnp.arange(length, dtype=jnp.float32)
  if align_corners:
    inside = steps * (size[:, None] - 1) / max(length - 1, 1)
  else:
    inside = (steps + 0.5) * size[:, None] / length - 0.5
  positions = first[:, None] + jnp.clip(inside, 0, size[:, None] - 1)
  return jnp.maximum(1 - jnp.abs(positions[:, :, None] - steps), 0)


_FUNCTIONS = (
    identity, crop, flip, crop_and_flip, resized_crop, resized_crop_and_flip, roll_and_flip)
_BY_NAME = {
    'none': identity, **{function.__name__: function for function in _FUNCTIONS}, 'shift': shift}
