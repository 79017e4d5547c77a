"""Random views of images [B, H, W, C]: key first, pure, differentiable, dtype kept.

Each draws anew for every image (`roll_and_flip`: once for the batch). Images are
in [0, 1], so that what lies outside of one is black.
"""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dfkd_jax.messages import check_choice
from dfkd_jax.types import Array, PRNGKey

_ATTEMPTS = 10  # At a resized crop that fits, as in torchvision.


def create(name: str, **options) -> Callable[[PRNGKey, Array], Array]:
  """An augmentation (key, images) -> images by name, for configs.

  Args:
    name: 'none' or the name of a function of this file with a key.
    **options: That function's further arguments.

  Raises:
    ValueError: On another name, or on options that do not belong to it.
  """
  function = _BY_NAME[check_choice(name, _BY_NAME, 'augmentation')]
  allowed = list(inspect.signature(function).parameters)[2:]
  for option in options:
    if option not in allowed:
      raise ValueError(f'augmentation {name!r} has no option {option!r}; it has {allowed}.')
  return functools.partial(function, **options)


def identity(key: PRNGKey, images: Array) -> Array:
  """The images as they are."""
  del key
  return images


def crop(key: PRNGKey, images: Array, pad: int = 4) -> Array:
  """Pads by `pad` black pixels, then cuts each image at one of (2 pad + 1)^2 places."""
  return crop_at(images, jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1), pad)


shift = crop  # The name it goes by where flips would change the class, as with digits.


def flip(key: PRNGKey, images: Array) -> Array:
  """Mirrors each image left to right with probability 1/2."""
  return flip_where(images, jax.random.bernoulli(key, shape=images.shape[:1]))


def crop_and_flip(key: PRNGKey, images: Array, pad: int = 4) -> Array:
  """`crop`, then `flip`: the view of CIFAR-sized images, in synthesis and in distillation."""
  crop_key, flip_key = jax.random.split(key)
  return flip(flip_key, crop(crop_key, images, pad))


def resized_crop(
    key: PRNGKey,
    images: Array,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    align_corners: bool = True,
) -> Array:
  """A box of random area and shape out of each image, back at full size.

  GoogLeNet's crop (arXiv:1409.4842) as in torchvision: of ten boxes the first that
  fits in the image. If none fits, the first one is cut down to the image.

  Args:
    key: PRNG key.
    images: [B, H, W, C].
    scale: Bounds of the area, as a part of the image's.
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
  places = jax.random.uniform(place_key, (count, 2), jnp.float32)
  corners = jnp.minimum(jnp.floor(places * (limits - sizes + 1)), limits - sizes)
  return resize_boxes(images, corners, sizes, align_corners=align_corners)


def resized_crop_and_flip(
    key: PRNGKey,
    images: Array,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    align_corners: bool = True,
) -> Array:
  """`resized_crop`, then `flip`: the view of ImageNet-sized images, and CMI's local view."""
  crop_key, flip_key = jax.random.split(key)
  return flip(flip_key, resized_crop(crop_key, images, scale, ratio, align_corners))


def roll_and_flip(key: PRNGKey, images: Array, pixels: int = 4) -> Array:
  """Rolls the whole batch by up to `pixels` both ways, and mirrors it or not (DeepInversion's jitter)."""
  roll_key, flip_key = jax.random.split(key)
  offsets = jax.random.randint(roll_key, (2,), -pixels, pixels + 1)
  images = jnp.roll(images, offsets, axis=(1, 2))
  return flip_where(images, jnp.broadcast_to(jax.random.bernoulli(flip_key), images.shape[:1]))


def crop_at(images: Array, offsets_xy: Array, pad: int) -> Array:
  """Cuts each image out of itself padded by zeros.

  Args:
    images: [B, H, W, C].
    offsets_xy: [B, 2] integers in 0..2*pad, column then row in the padded image;
      `pad` is the middle, which changes nothing.
    pad: Width of the border.

  Returns:
    [B, H, W, C].
  """
  padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  cut = lambda image, offset: lax.dynamic_slice(image, (offset[1], offset[0], 0), images.shape[1:])
  return jax.vmap(cut)(padded, offsets_xy)


def flip_where(images: Array, flags: Array) -> Array:
  """Mirrors left to right those of [B, H, W, C] where `flags` [B] is true."""
  return jnp.where(flags.astype(bool)[:, None, None, None], images[:, :, ::-1], images)


def resize_boxes(images: Array, corners: Array, sizes: Array, *, align_corners: bool = True) -> Array:
  """Bilinear interpolation of a box of each image to the image's size.

  Args:
    images: [B, H, W, C] float.
    corners: [B, 2] first row and column of each box.
    sizes: [B, 2] rows and columns of each box, at least 1.
    align_corners: Whether the outer pixels' centres of box and result coincide;
      else their outer edges do.

  Returns:
    [B, H, W, C].
  """
  images_dtype, (height, width) = images.dtype, images.shape[1:3]
  rows = _weights(corners[:, 0], sizes[:, 0], height, align_corners).astype(images_dtype)
  columns = _weights(corners[:, 1], sizes[:, 1], width, align_corners).astype(images_dtype)
  # Products of matrices, whose gradient needs no scatter; in full precision, as they carry the image.
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  return product('bvw,bhwc->bhvc', columns, product('buh,bhwc->buwc', rows, images))


def _weights(first: Array, size: Array, length: int, align_corners: bool) -> Array:
  """How much each source pixel counts in each pixel of the result: [B, length, length]."""
  steps = jnp.arange(length, dtype=jnp.float32)
  if align_corners:
    inside = steps * (size[:, None] - 1) / max(length - 1, 1)
  else:
    inside = (steps + 0.5) * size[:, None] / length - 0.5
  places = first[:, None] + jnp.clip(inside, 0, size[:, None] - 1)
  return jnp.maximum(1 - jnp.abs(places[:, :, None] - steps), 0)


_BY_NAME = {
    'none': identity,
    **{function.__name__: function for function in (
        identity, crop, flip, crop_and_flip, resized_crop, resized_crop_and_flip, roll_and_flip)},
    'shift': shift,
}
