"""A plain small network for small data sets, such as 28x28 grey images."""

from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array


class ConvNet(nn.Module):
  """A 3x3 convolution, batch norm and ReLU per width; mean over pixels; dense layer.

  Attributes:
    widths: Channels of the convolutions.
    strides: Strides of the convolutions, as many as `widths`.

  Raises:
    ValueError: The numbers of strides and widths differ.
  """

  num_classes: int
  widths: tuple[int, ...] = (16, 32, 32, 64, 80)
  strides: tuple[int, ...] = (1, 2, 1, 2, 1)
  dtype: Any = None

  def __post_init__(self) -> None:
    if len(self.widths) != len(self.strides):
      raise ValueError(
          f'{len(self.widths)} widths {self.widths} need as many strides, not {self.strides}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, num_classes], at least float32."""
    conv_norm = layers.conv_norm(train, self.dtype)
    for i, (width, strides) in enumerate(zip(self.widths, self.strides, strict=True), 1):
      x = nn.relu(conv_norm(x, width, 3, strides, names=(f'conv{i}', f'bn{i}')))
      self.sow('intermediates', f'stage_{i}', x)
    x = layers.pool_features(self, x)
    return layers.dense(self.num_classes, x.shape[-1], name='fc')(x)
