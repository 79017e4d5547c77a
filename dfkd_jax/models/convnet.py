"""A plain small network for small data sets, such as 28x28 grey images."""

from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array


class ConvNet(nn.Module):
  """3x3 convolution, batch norm, ReLU, as often as there are widths; mean over pixels; dense layer.

  Attributes:
    num_classes: Of the logits.
    widths: Channels of the convolutions.
    strides: Of the convolutions, as many as `widths`.
    dtype: Of the computation; None for that of parameters and inputs.

  Raises:
    ValueError: If there are not as many strides as widths.
  """

  num_classes: int
  widths: tuple[int, ...] = (16, 32, 32, 64, 80)
  strides: tuple[int, ...] = (1, 2, 1, 2, 1)
  dtype: Any = None

  def __post_init__(self) -> None:
    if len(self.widths) != len(self.strides):
      raise ValueError(f'{len(self.widths)} widths {self.widths} need as many strides, not {self.strides}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalised images [B, H, W, C] to logits [B, num_classes], at least float32."""
    for i, (width, strides) in enumerate(zip(self.widths, self.strides, strict=True), 1):
      x = layers.Conv(
          width, (3, 3), strides, padding=1, use_bias=False, kernel_init=layers.he_fan_out,
          dtype=self.dtype, name=f'conv{i}')(x)
      x = nn.relu(layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name=f'bn{i}')(x))
      self.sow('intermediates', f'stage_{i}', x)
    x = layers.pool_features(self, x)
    return layers.dense(self.num_classes, x.shape[-1], name='fc')(x)
