"""MobileNetV2 (Sandler et al., arXiv:1801.04381)."""

import functools
from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array

# Table 2 of the paper: expansion, channels, blocks and strides of each stage.
_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1))


def round_channels(channels: float, divisor: int = 8) -> int:
  """Nearest positive multiple of `divisor` that is at most a tenth smaller."""
  rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
  """Expansion (1x1), depthwise 3x3 and projection (1x1), named `conv_*` as in torchvision.

  Attributes:
    width: Output channels.
    strides: Strides of the depthwise convolution.
    expansion: Inner channels per input channel; 1 leaves the first convolution out.
    epsilon: Epsilon of the batch norms.
    dtype: Dtype of the computation. None uses the dtype of parameters and inputs.
  """

  width: int
  strides: int = 1
  expansion: int = 6
  epsilon: float = 1e-5
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), width]."""
    conv_norm = layers.conv_norm(train, self.dtype, epsilon=self.epsilon)
    inner, y, number = self.expansion * x.shape[-1], x, 0
    if self.expansion != 1:
      y, number = nn.relu6(conv_norm(y, inner, 1, names=('conv_0_0', 'conv_0_1'))), 1
    y = nn.relu6(conv_norm(
        y, inner, 3, self.strides, names=(f'conv_{number}_0', f'conv_{number}_1'),
        feature_group_count=inner))
    y = conv_norm(y, self.width, 1, names=(f'conv_{number + 1}', f'conv_{number + 2}'))
    return x + y if self.strides == 1 and x.shape[-1] == self.width else y


class MobileNetV2(nn.Module):
  """MobileNetV2 under torchvision's names, without the dropout before the last layer.

  Attributes:
    num_classes: Number of logits.
    width: Factor of all channels; the last convolution keeps at least 1280.
    epsilon: Epsilon of the batch norms.
    remat: Whether the backward pass keeps only the input of each block.
    dtype: Dtype of the computation. None uses the dtype of parameters and inputs.
  """

  num_classes: int
  width: float = 1.0
  epsilon: float = 1e-5
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, num_classes], at least float32."""
    conv_norm = layers.conv_norm(train, self.dtype, epsilon=self.epsilon)
    stem = round_channels(32 * self.width)
    x = nn.relu6(conv_norm(x, stem, 3, 2, names=('features_0_0', 'features_0_1')))
    index = 1
    for stage, (expansion, channels, size, strides) in enumerate(_STAGES, 1):
      for j in range(size):
        block = functools.partial(
            InvertedResidual, round_channels(channels * self.width), 1 if j else strides,
            expansion, self.epsilon, self.dtype, name=f'features_{index}')
        run = functools.partial(layers.apply_block, block, train)
        x = layers.remat_if(self, run, x, self.remat)
        index += 1
      self.sow('intermediates', f'stage_{stage}', x)
    last = round_channels(1280 * max(1.0, self.width))
    x = nn.relu6(conv_norm(x, last, 1, names=(f'features_{index}_0', f'features_{index}_1')))
    x = layers.pool_features(self, x)
    init = nn.initializers.normal(0.01)
    return nn.Dense(self.num_classes, kernel_init=init, name='classifier_1')(x)
