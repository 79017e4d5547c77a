"""Generators: latents to images in [0, 1]."""

from typing import Any, ClassVar

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array


class Generator(nn.Module):
  """Latents [B, Z] to images [B, H, W, C]: a dense layer, then twice the size and twice again.

  The generator of DAFL (arXiv:1904.01186), CMI (arXiv:2105.08584) and FastDFKD
  (arXiv:2112.06253) for small images. Its running moments are needed only by
  those who sample with `train=False`; others pass parameters alone and
  `mutable=['batch_stats']`, and drop what comes back.

  Attributes:
    image_shape: (H, W, C); H and W divisible by 4.
    width: Channels of the last hidden convolution; twice that of the first.
    stem_width: Channels before the convolutions; None for `2 * width`. With
      width 64, 256 gives the "large" generator of DataFree's baselines.
    dtype: Of the computation; None for that of parameters and inputs.

  Raises:
    ValueError: If the image is not divisible by 4 on either axis.
  """

  image_shape: tuple[int, int, int] = (32, 32, 3)
  width: int = 64
  stem_width: int | None = None
  dtype: Any = None

  first_layers: ClassVar[tuple[str, ...]] = ('l1_0', 'conv_blocks_0')  # What FastDFKD re-draws once.

  def __post_init__(self) -> None:
    if self.image_shape[0] % 4 or self.image_shape[1] % 4:
      raise ValueError(f'A generator makes images divisible by 4 on both axes, not {self.image_shape[:2]}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, latents: Array, train: bool = True) -> Array:
    """Latents [B, Z] to images [B, H, W, C] in (0, 1), at least float32."""
    height, width = self.image_shape[0] // 4, self.image_shape[1] // 4
    channels = self.stem_width or 2 * self.width
    x = layers.dense(channels * height * width, latents.shape[-1], dtype=self.dtype, name='l1_0')(latents)
    # Channel-major, so that published weights fit.
    x = x.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    x = layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name='conv_blocks_0')(x)
    x = _conv_block(x, 2 * self.width, 2, train, self.dtype, upsample=True)
    x = _conv_block(x, self.width, 6, train, self.dtype, upsample=True)
    return _to_image(x, self.image_shape[-1], 9, self.dtype)


class SpatialGenerator(nn.Module):
  """Latents [B, h, w, Z] to images of 2^(len(widths) - 1) times the size: FastDFKD's for ImageNet.

  Published for 224x224 pixels from latents [B, 14, 14, 256].

  Attributes:
    widths: Channels of the convolutions; all but the first come after an upsampling.
    channels: Of the image.
    dtype: Of the computation; None for that of parameters and inputs.
  """

  widths: tuple[int, ...] = (128, 128, 64, 64, 64)
  channels: int = 3
  dtype: Any = None

  first_layers: ClassVar[tuple[str, ...]] = ('conv_blocks_0', 'conv_blocks_1')

  @nn.compact
  def __call__(self, latents: Array, train: bool = True) -> Array:
    """Latents [B, h, w, Z] to images [B, H, W, C] in (0, 1), at least float32."""
    x = latents
    for i, width in enumerate(self.widths):
      x = _conv_block(x, width, 4 * i, train, self.dtype, upsample=i > 0)
    return _to_image(x, self.channels, 4 * len(self.widths) - 1, self.dtype)


def _conv_block(x, width, index, train, dtype, upsample):
  """Upsampling or not, convolution, batch norm and leaky ReLU, called `conv_blocks_<index>` and `<index + 1>`."""
  if upsample:
    x = layers.UpsampledConv(width, dtype=dtype, name=f'conv_blocks_{index}')(x)
  else:
    x = layers.Conv(
        width, (3, 3), padding=1, use_bias=False, kernel_init=layers.uniform_fan_in, dtype=dtype,
        name=f'conv_blocks_{index}')(x)
  x = layers.BatchNorm(use_running_average=not train, dtype=dtype, name=f'conv_blocks_{index + 1}')(x)
  return nn.leaky_relu(x, 0.2)


def _to_image(x, channels, index, dtype):
  x = layers.Conv(
      channels, (3, 3), padding=1, kernel_init=layers.uniform_fan_in,
      bias_init=layers.uniform_bias(9 * x.shape[-1]), dtype=dtype, name=f'conv_blocks_{index}')(x)
  return nn.sigmoid(layers.at_least_float32(x))
