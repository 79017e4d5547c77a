"""Generators: latents to images in [0, 1]."""

import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array


class Generator(nn.Module):
  """Latents [B, Z] to images [B, H, W, C]: a dense layer, then two upsamplings by two.

  The generator of DAFL (arXiv:1904.01186), CMI (arXiv:2105.08584) and FastDFKD (arXiv:2112.06253)
  for small images. Only sampling with `train=False` needs its running moments. Training passes
  parameters alone and `mutable=['batch_stats']`, and drops the new running moments.

  Attributes:
    image_shape: (H, W, C); H and W divisible by 4.
    width: Channels of the last hidden convolution; the first has twice as many.
    stem_width: Channels before the convolutions; None for `2 * width`. With width 64, 256 gives
      the "large" generator of DataFree's baselines.

  Raises:
    ValueError: H or W is not divisible by 4.
  """

  image_shape: tuple[int, int, int] = (32, 32, 3)
  width: int = 64
  stem_width: int | None = None
  dtype: Any = None

  first_layers: ClassVar[tuple[str, ...]] = ('l1_0', 'conv_blocks_0')  # FastDFKD redraws them once.

  def __post_init__(self) -> None:
    if self.image_shape[0] % 4 or self.image_shape[1] % 4:
      raise ValueError(
          f'A generator makes images divisible by 4 on both axes, not {self.image_shape[:2]}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, latents: Array, train: bool = True) -> Array:
    """Latents [B, Z] to images [B, H, W, C] in (0, 1), at least float32."""
    height, width = self.image_shape[0] // 4, self.image_shape[1] // 4
    channels = self.stem_width or 2 * self.width
    x = layers.dense(
        channels * height * width, latents.shape[-1], dtype=self.dtype, name='l1_0')(latents)
    # Channel-major, as in published weights.
    x = x.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    x = layers.BatchNorm(
        use_running_average=not train, dtype=self.dtype, name='conv_blocks_0')(x)
    x = _conv_block(x, 2 * self.width, 2, train, self.dtype, upsample=True)
    x = _conv_block(x, self.width, 6, train, self.dtype, upsample=True)
    return _to_image(x, self.image_shape[-1], 9, self.dtype)


class SpatialGenerator(nn.Module):
  """Latents [B, h, w, Z] to images of 2^(len(widths) - 1) times the size: FastDFKD's for ImageNet.

  Published for 224x224 pixels from latents [B, 14, 14, 256]. The layers after the last upsampling
  take most of its time: 1.85 of 2.69 GFLOPs per image, as XLA counts the forward pass. With
  `last='subpixel'` the last stage is left out, and the convolution to the image gives four pixels
  each at half the resolution (arXiv:1609.05158): 0.17 of 1.01 GFLOPs. Its four kernels start
  alike, as one kernel after nearest upsampling (arXiv:1707.02937), so there is no checkerboard.

  Attributes:
    widths: Channels of the convolutions; all but the first come after an upsampling.
    channels: Channels of the image.
    last: 'conv' as published, or 'subpixel', which leaves the last of `widths` unused.

  Raises:
    ValueError: `last` is unknown, or it is 'subpixel' and there is only one width.
  """

  widths: tuple[int, ...] = (128, 128, 64, 64, 64)
  channels: int = 3
  last: str = 'conv'
  remat: bool = False
  dtype: Any = None

  first_layers: ClassVar[tuple[str, ...]] = ('conv_blocks_0', 'conv_blocks_1')

  def __post_init__(self) -> None:
    if self.last not in ('conv', 'subpixel'):
      raise ValueError(f'Unknown last stage {self.last!r}; there are conv, subpixel.')
    if self.last == 'subpixel' and len(self.widths) < 2:
      raise ValueError(
          f"A last stage 'subpixel' needs at least 2 widths, not {tuple(self.widths)}.")
    super().__post_init__()

  def latent_shape(
      self, image_shape: tuple[int, int, int], latent_dim: int) -> tuple[int, int, int]:
    """Shape (h, w, Z) of one image's latents.

    Args:
      image_shape: (H, W, C).
      latent_dim: Channels Z of the latents.

    Raises:
      ValueError: The image's size is no multiple of the scale, or it has other channels.
    """
    height, width, channels = image_shape
    scale = 2 ** (len(self.widths) - 1)
    if height % scale or width % scale:
      raise ValueError(
          f'A spatial generator of {len(self.widths)} widths makes images divisible by {scale} '
          f'on both axes, not {(height, width)}.')
    if channels != self.channels:
      raise ValueError(
          f'This generator makes images of {self.channels} channels, not {channels}.')
    return height // scale, width // scale, latent_dim

  @nn.compact
  def __call__(self, latents: Array, train: bool = True) -> Array:
    """Latents [B, h, w, Z] to images [B, H, W, C] in (0, 1), at least float32."""
    x, widths = latents, self.widths[:-1] if self.last == 'subpixel' else self.widths
    for i, width in enumerate(widths):
      run = functools.partial(
          _conv_block, width=width, index=4 * i, train=train, dtype=self.dtype, upsample=i > 0)
      x = layers.remat_if(self, run, x, self.remat)
    to_image = _to_larger_image if self.last == 'subpixel' else _to_image
    return to_image(x, self.channels, 4 * len(widths) - 1, self.dtype)


def _conv_block(x, width, index, train, dtype, upsample):
  """Applies `conv_blocks_<index>`, after any upsampling, its batch norm and a leaky ReLU."""
  names = (f'conv_blocks_{index}', f'conv_blocks_{index + 1}')
  if upsample:
    x = layers.UpsampledConv(width, dtype=dtype, name=names[0])(x)
    x = layers.BatchNorm(use_running_average=not train, dtype=dtype, name=names[1])(x)
  else:
    conv_norm = layers.conv_norm(train, dtype, kernel_init=layers.uniform_fan_in)
    x = conv_norm(x, width, 3, names=names)
  return nn.leaky_relu(x, 0.2)


def _to_image(x, channels, index, dtype):
  """Maps [B, H, W, D] to images [B, H, W, C]."""
  x = layers.Conv(
      channels, (3, 3), padding=1, kernel_init=layers.uniform_fan_in,
      bias_init=layers.uniform_bias(9 * x.shape[-1]), dtype=dtype, name=f'conv_blocks_{index}')(x)
  return nn.sigmoid(layers.at_least_float32(x))


def _to_larger_image(x, channels, index, dtype):
  """Maps [B, h, w, D] to images [B, 2h, 2w, C]."""
  batch, height, width, inputs = x.shape
  x = layers.Conv(
      4 * channels, (3, 3), padding=1, kernel_init=_repeat_four_times(layers.uniform_fan_in),
      bias_init=_repeat_four_times(layers.uniform_bias(9 * inputs)), dtype=dtype,
      name=f'conv_blocks_{index}')(x)
  x = x.reshape(batch, height, width, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
  return nn.sigmoid(layers.at_least_float32(x.reshape(batch, 2 * height, 2 * width, channels)))


def _repeat_four_times(init: nn.initializers.Initializer) -> nn.initializers.Initializer:
  """Initializes four pixels, the slower axis of the outputs, to equal values."""

  def repeated(key, shape, dtype=jnp.float32):
    return jnp.tile(init(key, (*shape[:-1], shape[-1] // 4), dtype), 4)

  return repeated
