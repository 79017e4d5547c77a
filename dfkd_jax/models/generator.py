"""Generators: latents to images in [0, 1]. They make maps of the next larger size and crop them."""

import functools
import math
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.messages import check_choice
from dfkd_jax.models import layers
from dfkd_jax.models.dense_layers import TransposedConv
from dfkd_jax.types import Array


class Generator(nn.Module):
  """Latents [B, Z] to images [B, H, W, C] in (0, 1): a dense layer, then two upsamplings by two.

  The generator of DAFL (arXiv:1904.01186), CMI (arXiv:2105.08584) and FastDFKD (arXiv:2112.06253)
  for small images. Only sampling with `train=False` needs its running moments. Training passes
  parameters alone and `mutable=['batch_stats']`, and drops the new running moments.
  """

  image_shape: tuple[int, int, int] = (32, 32, 3)  # (H, W, C).
  width: int = 64  # Channels of the last hidden convolution; the first has twice as many.
  stem_width: int | None = None  # Channels before them (256: DataFree's "large"), or 2 * width.
  dtype: Any = None
  first_layers: ClassVar[tuple[str, ...]] = ('l1_0', 'conv_blocks_0')  # FastDFKD redraws them once.

  @nn.compact
  def __call__(self, latents: Array, train: bool = True) -> Array:
    shape = (self.stem_width or 2 * self.width, *_divided(self.image_shape, 4))
    dense = layers.dense(math.prod(shape), latents.shape[-1], dtype=self.dtype, name='l1_0')
    # Channel-major, as in published weights.
    x = dense(latents).reshape(-1, *shape).transpose(0, 2, 3, 1)
    norm = layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name='conv_blocks_0')
    x = _conv_block(self, norm(x), 2 * self.width, 2, train)
    x = _conv_block(self, x, self.width, 6, train)
    return _cut(_to_image(self, x, self.image_shape[-1], 9), self.image_shape)


class DFADGenerator(nn.Module):
  """Latents [B, Z] to images [B, H, W, C] in (0, 1) by four transposed convolutions.

  DFAD's generator for segmentation (arXiv:1912.11006), published for 128x128 pixels: 11,243,203
  parameters with a latent of 256. Its tanh is in the space of images of mean and std 0.5. The same
  images in (0, 1) are the sigmoid of twice the last maps.
  """

  image_shape: tuple[int, int, int] = (128, 128, 3)  # (H, W, C).
  widths: tuple[int, ...] = (512, 256, 128, 64, 64)  # Of the first maps, then of each convolution.
  dtype: Any = None
  first_layers: ClassVar[tuple[str, ...]] = ('linear', 'bn0')

  @nn.compact
  def __call__(self, latents: Array, train: bool = True) -> Array:
    (first, *widths), normal = self.widths, nn.initializers.normal(0.02)
    shape = (first, *_divided(self.image_shape, 2**len(widths)))
    settings = {'dtype': self.dtype, 'kernel_init': normal}
    norm = functools.partial(
        layers.BatchNorm, use_running_average=not train, dtype=self.dtype,
        scale_init=lambda *arguments: 1 + normal(*arguments))
    x = nn.Dense(math.prod(shape), name='linear', **settings)(latents)
    x = x.reshape(-1, *shape).transpose(0, 2, 3, 1)  # Channel-major, as in PyTorch.
    x = norm(name='bn0')(x)
    for i, width in enumerate(widths, 1):
      x = TransposedConv(width, 4, name=f'deconv{i}', **settings)(x)
      x = nn.leaky_relu(norm(name=f'bn{i}')(x), 0.2)
    x = layers.Conv(self.image_shape[-1], (3, 3), padding=1, name='conv', **settings)(x)
    return _cut(nn.sigmoid(2 * layers.at_least_float32(x)), self.image_shape)


class SpatialGenerator(nn.Module):
  """Latents [B, h, w, Z] to images in (0, 1) of 2^(len(widths) - 1) times the size.

  FastDFKD's for ImageNet, published for 224x224 pixels from latents [B, 14, 14, 256]: 2.69 GFLOPs
  per image, as XLA counts the forward pass. With `last='subpixel'`, 1.01: the last stage is left
  out, and the convolution to the image gives four pixels each at half the resolution
  (arXiv:1609.05158). Its four kernels start alike, as one kernel after nearest upsampling
  (arXiv:1707.02937), so there is no checkerboard.
  """

  widths: tuple[int, ...] = (128, 128, 64, 64, 64)  # Of the convolutions; upsamples between them.
  channels: int = 3  # Of the image.
  size: tuple[int, int] | None = None  # (H, W) that images are cut to.
  last: str = 'conv'  # As published, or 'subpixel'.
  remat: bool = False
  dtype: Any = None
  first_layers: ClassVar[tuple[str, ...]] = ('conv_blocks_0', 'conv_blocks_1')

  def __post_init__(self) -> None:
    check_choice(self.last, ('conv', 'subpixel'), 'last stage')
    if self.last == 'subpixel' and len(self.widths) < 2:
      raise ValueError(
          f"A last stage 'subpixel' needs at least 2 widths, not {tuple(self.widths)}.")
    super().__post_init__()

  def latent_shape(
      self, image_shape: tuple[int, int, int], latent_dim: int) -> tuple[int, int, int]:
    """Shape (h, w, Z) of the latents of one image (H, W, C). Raises ValueError for another C."""
    if image_shape[-1] != self.channels:
      raise ValueError(
          f'This generator makes images of {self.channels} channels, not {image_shape[-1]}.')
    return *_divided(image_shape, 2 ** (len(self.widths) - 1)), latent_dim

  @nn.compact
  def __call__(self, latents: Array, train: bool = True) -> Array:
    x, widths, factor = latents, self.widths, 1
    if self.last == 'subpixel':
      widths, factor = widths[:-1], 2
    for i, width in enumerate(widths):
      run = functools.partial(
          _conv_block, self, width=width, index=4 * i, train=train, upsample=i > 0)
      x = layers.apply_block(self, run, x)
    images = _to_image(self, x, self.channels, 4 * len(widths) - 1, factor)
    return images if self.size is None else _cut(images, self.size)


def _divided(shape, scale):
  """Returns height and width of the maps that, enlarged by `scale`, cover an image."""
  return -(-shape[0] // scale), -(-shape[1] // scale)


def _cut(images, shape):
  return images[:, :shape[0], :shape[1]]


def _conv_block(module, x, width, index, train, upsample=True):
  """Applies `conv_blocks_<index>`, after any upsampling, its batch norm and a leaky ReLU."""
  options = {'dtype': module.dtype, 'name': f'conv_blocks_{index}'}
  conv = layers.UpsampledConv(width, **options) if upsample else layers.Conv(
      width, (3, 3), padding=1, use_bias=False, kernel_init=layers.uniform_fan_in, **options)
  norm = layers.BatchNorm(
      use_running_average=not train, dtype=module.dtype, name=f'conv_blocks_{index + 1}')
  return nn.leaky_relu(norm(conv(x)), 0.2)


def _to_image(module, x, channels, index, factor=1):
  """Maps [B, h, w, D] to images [B, factor h, factor w, C], by subpixels that start alike."""
  batch, height, width, inputs = x.shape

  def repeat(init):
    return lambda key, shape, dtype: jnp.tile(init(key, (*shape[:-1], channels), dtype), factor**2)

  x = layers.Conv(
      factor**2 * channels, (3, 3), padding=1, kernel_init=repeat(layers.uniform_fan_in),
      bias_init=repeat(layers.uniform_bias(9 * inputs)), dtype=module.dtype,
      name=f'conv_blocks_{index}')(x)
  if factor > 1:
    x = x.reshape(batch, height, width, factor, factor, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, factor * height, factor * width, channels)
  return nn.sigmoid(layers.at_least_float32(x))
