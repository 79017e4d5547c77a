"""Wide residual networks (Zagoruyko & Komodakis, arXiv:1605.07146)."""

import functools
from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array


class Block(nn.Module):
  """Batch norm and ReLU before each of two 3x3 convolutions.

  Attributes:
    width: Output channels.
    strides: Strides of the first convolution.
  """

  width: int
  strides: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), width]."""
    conv = functools.partial(
        layers.Conv, use_bias=False, kernel_init=layers.he_fan_out, dtype=self.dtype)
    norm = functools.partial(layers.BatchNorm, use_running_average=not train, dtype=self.dtype)
    active = nn.relu(norm(name='bn1')(x))
    y = conv(self.width, (3, 3), self.strides, padding=1, name='conv1')(active)
    y = conv(self.width, (3, 3), padding=1, name='conv2')(nn.relu(norm(name='bn2')(y)))
    if x.shape[-1] == self.width:
      return x + y
    return y + conv(self.width, (1, 1), self.strides, padding=0, name='convShortcut')(active)


class WideResNet(nn.Module):
  """WRN-depth-widen: three groups of (depth - 4) / 6 blocks, no dropout.

  Attributes:
    depth: Number of layers, 6n + 4.
    widen: Factor of the widths 16, 32 and 64.

  Raises:
    ValueError: `depth` is not 6n + 4.
  """

  num_classes: int
  depth: int = 16
  widen: int = 1
  dtype: Any = None

  def __post_init__(self) -> None:
    if self.depth < 10 or self.depth % 6 != 4:
      raise ValueError(
          f'A wide ResNet has 6n + 4 layers (10, 16, 22, 28, 40, ...), not {self.depth}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, num_classes], at least float32."""
    x = layers.Conv(
        16, (3, 3), padding=1, use_bias=False, kernel_init=layers.he_fan_out, dtype=self.dtype,
        name='conv1')(x)
    for group in range(3):
      for i in range((self.depth - 4) // 6):
        x = Block(
            16 * self.widen * 2**group, 2 if group and not i else 1, self.dtype,
            name=f'block{group + 1}_layer_{i}')(x, train)
      self.sow('intermediates', f'stage_{group + 1}', x)
    norm = layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name='bn1')
    x = layers.pool_features(self, nn.relu(norm(x)))
    init = nn.initializers.zeros
    return layers.dense(self.num_classes, x.shape[-1], bias_init=init, name='fc')(x)
