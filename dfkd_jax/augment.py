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

_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def create(name: str, **options) -> Callable[[PRNGKey, Array], Array]:
  """Makes an augmentation (key, images) -> images for configs.

  `name` is 'none', 'shift' or a random function here, such as 'crop_and_flip'; `options` are its
  further arguments. A ValueError lists the names if one is wrong.
  """
  function = _BY_NAME[check_choice(name, _BY_NAME, 'augmentation')]
  for option in options:
    check_choice(option, [*inspect.signature(function).parameters][2:], f'option of {name!r}')
  return functools.partial(function, **options)


def identity(key: PRNGKey, images: Array) -> Array:
  """Returns the images unchanged."""
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


def random_crop(key: PRNGKey, images: Array, size: tuple[int, int]) -> Array:
  """Cuts a box of `size`, (h, w), at a random place of each image: [B, H, W, C] -> [B, h, w, C].

  Images that are smaller are padded at the right and at the bottom first.
  """
  missing = [max(side - length, 0) for side, length in zip(size, images.shape[1:3], strict=True)]
  images = jnp.pad(images, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
  ends = jnp.array([images.shape[1] - size[0] + 1, images.shape[2] - size[1] + 1])
  return _cut(images, jax.random.randint(key, (images.shape[0], 2), 0, ends), size)


def random_crop_and_flip(key: PRNGKey, images: Array, size: tuple[int, int]) -> Array:
  """`random_crop`, then `flip`: for training on photos with masks."""
  crop_key, flip_key = jax.random.split(key)
  return flip(flip_key, random_crop(crop_key, images, size))


def resized_crop(key: PRNGKey, images: Array, scale: tuple[float, float] = _SCALE,
                 ratio: tuple[float, float] = _RATIO, align_corners: bool = True) -> Array:
  """Resizes a box of random area and shape from each image to full size.

  GoogLeNet's crop (arXiv:1409.4842) as in torchvision: the first of ten boxes that fits in the
  image. If none fits, the first box is cut down to the image. `scale` bounds the box's share of
  the image's area; `ratio` bounds width / height, drawn log-uniformly.
  """
  area_key, ratio_key, place_key = jax.random.split(key, 3)
  count, limits = images.shape[0], jnp.asarray(images.shape[1:3], jnp.float32)
  draw = functools.partial(jax.random.uniform, shape=(10, count), dtype=jnp.float32)
  areas = draw(area_key, minval=scale[0], maxval=scale[1]) * limits.prod()
  ratios = jnp.exp(draw(ratio_key, minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1])))
  sizes = jnp.round(jnp.sqrt(jnp.stack([areas / ratios, areas * ratios], axis=-1)))
  fits = jnp.all((sizes >= 1) & (sizes <= limits), axis=-1)
  sizes = jnp.clip(sizes[jnp.argmax(fits, axis=0), jnp.arange(count)], 1, limits)
  positions = jax.random.uniform(place_key, (count, 2), jnp.float32)
  corners = jnp.minimum(jnp.floor(positions * (limits - sizes + 1)), limits - sizes)
  return resize_boxes(images, corners, sizes, align_corners=align_corners)


def resized_crop_and_flip(key: PRNGKey, images: Array, scale: tuple[float, float] = _SCALE,
                          ratio: tuple[float, float] = _RATIO, align_corners: bool = True) -> Array:
  """`resized_crop`, then `flip`: for ImageNet-sized images, and CMI's local view."""
  crop_key, flip_key = jax.random.split(key)
  return flip(flip_key, resized_crop(crop_key, images, scale, ratio, align_corners))


def roll_and_flip(key: PRNGKey, images: Array, pixels: int = 4) -> Array:
  """DeepInversion's jitter: rolls the batch by up to `pixels`, and mirrors it half of the time."""
  roll_key, flip_key = jax.random.split(key)
  offsets = jax.random.randint(roll_key, (2,), -pixels, pixels + 1)
  flags = jnp.broadcast_to(jax.random.bernoulli(flip_key), images.shape[:1])
  return flip_where(jnp.roll(images, offsets, axis=(1, 2)), flags)


def with_masks(function: Callable[[PRNGKey, Array], Array], key: PRNGKey, images: Array,
               masks: Array, *, num_classes: int, ignore: int) -> tuple[Array, Array]:
  """Applies a random augmentation to images and to their masks, with the same geometry.

  A mask goes through `function` as one channel for each class. The new class of a pixel is the
  channel with the largest value. A pixel is unlabelled where the channels sum to less than 1/2:
  outside of the image, and where unlabelled pixels were.

  Args:
    function: A function of this module, or the result of `create`. Its random numbers must not
      depend on the number of channels.
    images: [B, H, W, C] float.
    masks: [B, H, W] integers: classes in 0..K-1. Any other label is unlabelled.
    num_classes: K.
    ignore: Label of unlabelled pixels; may be below K.

  Returns:
    (images, masks): the images are function(key, images); the masks are int32.
  """
  masks = masks.astype(jnp.int32)
  channels = jax.nn.one_hot(jnp.where(masks == ignore, num_classes, masks), num_classes)
  channels = function(jax.random.clone(key), channels)
  is_known = channels.sum(axis=-1) >= 0.5
  masks = jnp.where(is_known, jnp.argmax(channels, axis=-1), ignore).astype(jnp.int32)
  return function(key, images), masks


def crop_at(images: Array, offsets_xy: Array, pad: int) -> Array:
  """Pads images [B, H, W, C] by `pad` zeros on each side, then cuts each at its offset.

  `offsets_xy` are [B, 2] integers in 0..2*pad, column then row in the padded image. An offset of
  `pad` leaves the image unchanged.
  """
  padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  return _cut(padded, offsets_xy[:, ::-1], images.shape[1:3])


def _cut(images: Array, corners: Array, size: tuple[int, int]) -> Array:
  """Cuts a box of `size` from each image [B, H, W, C]; `corners` [B, 2] are row and column."""
  shape = (*size, images.shape[-1])
  cut = lambda image, corner: lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)
  return jax.vmap(cut)(images, corners)


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
  """

  def pixel_weights(axis):  # weight of each source pixel in each pixel of the result
    first, size, length = corners[:, axis], sizes[:, axis], images.shape[1 + axis]
    steps = jnp.arange(length, dtype=jnp.float32)
    if align_corners:
      inside = steps * (size[:, None] - 1) / max(length - 1, 1)
    else:
      inside = (steps + 0.5) * size[:, None] / length - 0.5
    positions = first[:, None] + jnp.clip(inside, 0, size[:, None] - 1)
    weights = jnp.maximum(1 - jnp.abs(positions[:, :, None] - steps), 0)
    return weights.astype(images.dtype)  # [B, length, length]

  # Matrix products, since their gradient needs no scatter; in full precision, as in resizing.
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  rows = product('buh,bhwc->buwc', pixel_weights(0), images)
  return product('bvw,bhwc->bhvc', pixel_weights(1), rows)


_BY_NAME = {function.__name__: function for function in (
    crop, flip, crop_and_flip, random_crop, random_crop_and_flip, resized_crop,
    resized_crop_and_flip, roll_and_flip)}
_BY_NAME |= {'none': identity, 'identity': identity, 'shift': shift}
