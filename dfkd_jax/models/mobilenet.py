"""MobileNetV2 (Sandler et al., arXiv:1801.04381)."""

import functools
from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array

# Table 2 of the paper: expansion, channels, blocks and strides of each stage.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def round_channels(channels: float, divisor: int = 8) -> int:
  """The nearest multiple of `divisor`, at least one of them, that is at most a tenth smaller."""
  rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
  """Expansion (1x1), depthwise 3x3 and projection (1x1), named `conv_*` as torchvision does.

  Attributes:
    width: Channels that come out.
    strides: Of the depthwise convolution.
    expansion: Channels within, per channel that comes in; 1 leaves the first convolution out.
    epsilon: Of the batch norms.
    dtype: Of the computation; None for that of parameters and inputs.
  """

  width: int
  strides: int = 1
  expansion: int = 6
  epsilon: float = 1e-5
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), width]."""
    unit = functools.partial(_conv_norm, train=train, epsilon=self.epsilon, dtype=self.dtype)
    inner, y, at = self.expansion * x.shape[-1], x, 0
    if self.expansion != 1:
      y, at = nn.relu6(unit(y, inner, 1, names=('conv_0_0', 'conv_0_1'))), 1
    y = nn.relu6(unit(
        y, inner, 3, self.strides, groups=inner, names=(f'conv_{at}_0', f'conv_{at}_1')))
    y = unit(y, self.width, 1, names=(f'conv_{at + 1}', f'conv_{at + 2}'))
    return x + y if self.strides == 1 and x.shape[-1] == self.width else y


class MobileNetV2(nn.Module):
  """As torchvision defines it, whose names these are, but without the dropout before the last layer.

  Attributes:
    num_classes: Of the logits.
    width: Factor of all channels; the last convolution keeps at least 1280.
    epsilon: Of the batch norms.
    remat: Keep only the input of each block for the backward pass.
    dtype: Of the computation; None for that of parameters and inputs.
  """

  num_classes: int
  width: float = 1.0
  epsilon: float = 1e-5
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalised images [B, H, W, C] to logits [B, num_classes], at least float32."""
    unit = functools.partial(_conv_norm, train=train, epsilon=self.epsilon, dtype=self.dtype)
    x = nn.relu6(unit(x, round_channels(32 * self.width), 3, 2, names=('features_0_0', 'features_0_1')))
    index = 1
    for stage, (expansion, channels, size, strides) in enumerate(_STAGES):
      for j in range(size):
        run = functools.partial(
            _run, round_channels(channels * self.width), 1 if j else strides, expansion, self.epsilon, self.dtype,
            f'features_{index}', train)
        x = layers.remat_if(self, run, x, self.remat)
        index += 1
      self.sow('intermediates', f'stage_{stage + 1}', x)
    last = round_channels(1280 * max(1.0, self.width))
    x = nn.relu6(unit(x, last, 1, names=(f'features_{index}_0', f'features_{index}_1')))
    x = layers.pool_features(self, x)
    return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name='classifier_1')(x)


def _run(width, strides, expansion, epsilon, dtype, name, train, x):
  return InvertedResidual(width, strides, expansion, epsilon, dtype, name=name)(x, train)


def _conv_norm(x, width, size, strides=1, *, groups=1, names, train, epsilon, dtype):
  """Convolution and batch norm by their two names."""
  x = layers.Conv(
      width, (size, size), strides, padding=size // 2, feature_group_count=groups, use_bias=False,
      kernel_init=layers.he_fan_out, dtype=dtype, name=names[0])(x)
  return layers.BatchNorm(use_running_average=not train, epsilon=epsilon, dtype=dtype, name=names[1])(x)
