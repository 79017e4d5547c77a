"""MobileNetV2 (Sandler et al., arXiv:1801.04381) and EfficientNet-Lite (arXiv:1905.11946)."""

import functools
import itertools
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.messages import check_choice
from dfkd_jax.models import layers
from dfkd_jax.types import Array

# Table 2 of MobileNetV2: expansion, channels, blocks and strides of each stage.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
          (6, 160, 3, 2), (6, 320, 1, 1))
# Table 1 of EfficientNet: size of the depthwise kernel, strides, expansion, channels and blocks.
_EFFICIENTNET = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
                 (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))
_NAMES = {  # Convolution and batch norm of each step, with and without an expansion.
    'torchvision': (
        (('conv_0_0', 'conv_0_1'), ('conv_1_0', 'conv_1_1'), ('conv_2', 'conv_3')),
        (('conv_0_0', 'conv_0_1'), ('conv_1', 'conv_2'))),
    'timm': (
        (('conv_pw', 'bn1'), ('conv_dw', 'bn2'), ('conv_pwl', 'bn3')),
        (('conv_dw', 'bn1'), ('conv_pw', 'bn2'))),
}
PADDINGS = {'same': 'SAME', 'torch': None}  # Of a convolution; None pads both sides alike.


def round_channels(channels: float, divisor: int = 8) -> int:
  """Nearest positive multiple of `divisor` that is at most a tenth smaller."""
  rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
  """Expansion (1x1), depthwise convolution and projection (1x1), each with a batch norm."""

  width: int
  strides: int = 1
  expansion: int = 6  # Inner channels per input channel; 1 leaves the first convolution out.
  size: int = 3  # Of the depthwise kernel, which has the strides.
  rate: int = 1  # Dilation of the depthwise kernel.
  padding: str = 'torch'  # One of `PADDINGS`; 'input' pads the block's input by the rate instead.
  names: str = 'torchvision'  # Library that names the submodules.
  epsilon: float = 1e-5
  momentum: float = 0.9
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    conv_norm = functools.partial(layers.conv_norm, self, train=train)
    inner, y, padding = self.expansion * x.shape[-1], x, 0
    if self.padding == 'input':
      y = jnp.pad(x, ((0, 0), (self.rate,) * 2, (self.rate,) * 2, (0, 0)))
    else:
      padding = PADDINGS[self.padding]
    *expand, depthwise, project = _NAMES[self.names][self.expansion == 1]
    for names in expand:
      y = nn.relu6(conv_norm(y, inner, 1, names=names))
    y = nn.relu6(conv_norm(
        y, inner, self.size, self.strides, names=depthwise, feature_group_count=inner,
        rate=self.rate, padding=padding))
    y = conv_norm(y, self.width, 1, names=project)
    return x + y if self.strides == 1 and x.shape[-1] == self.width else y


class MobileNetV2(nn.Module):
  """MobileNetV2 under torchvision's names, without the dropout before the last layer."""

  head = 'classifier_1'
  num_classes: int
  width: float = 1.0  # Factor of all channels; the last convolution keeps at least 1280.
  epsilon: float = 1e-5
  remat: bool = False
  dtype: Any = None
  head_width: int | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    conv_norm = functools.partial(layers.conv_norm, self, train=train)
    stem = round_channels(32 * self.width)
    x = nn.relu6(conv_norm(x, stem, 3, 2, names=('features_0_0', 'features_0_1')))
    names = (f'features_{index}' for index in itertools.count(1))
    stages = [
        [functools.partial(
            InvertedResidual, round_channels(channels * self.width), 1 if i else strides,
            expansion, epsilon=self.epsilon, dtype=self.dtype, name=next(names))
         for i in range(blocks)] for expansion, channels, blocks, strides in STAGES]
    x = layers.apply_stages(self, stages, x, train)
    last, name = round_channels(1280 * max(1.0, self.width)), next(names)
    x = nn.relu6(conv_norm(x, last, 1, names=(f'{name}_0', f'{name}_1')))
    return layers.classify(self, x, **layers.normal_inits)


class EfficientNetLite(nn.Module):
  """EfficientNet with ReLU6 and no squeeze-and-excitation, under timm's names; no dropout.

  Lite0, 1 and 2 were published for 224, 240 and 260 pixels, with images (x - 127) / 128 of bytes.
  Padding is 'same' as in TensorFlow, where strides pad more at the end, or 'torch', which pads both
  sides alike. Weights trained with one lose some accuracy with the other.
  """

  head = 'classifier'
  num_classes: int
  width: float = 1.0  # Factor of the channels of all stages, but not of stem and head.
  depth: float = 1.0  # Factor of the number of blocks, except in the first and last stage.
  padding: str = 'same'
  epsilon: float = 1e-3
  momentum: float = 0.99
  remat: bool = False
  dtype: Any = None
  head_width: int | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    conv_norm = functools.partial(layers.conv_norm, self, train=train)
    padding = PADDINGS[check_choice(self.padding, PADDINGS, 'padding')]
    x = nn.relu6(conv_norm(x, 32, 3, 2, names=('conv_stem', 'bn1'), padding=padding))
    stages = [
        [functools.partial(
            InvertedResidual, round_channels(channels * self.width), 1 if j else strides, expansion,
            size, padding=self.padding, names='timm', epsilon=self.epsilon, momentum=self.momentum,
            dtype=self.dtype, name=f'blocks_{i}_{j}')
         for j in range(math.ceil((self.depth if 0 < i < 6 else 1) * blocks))]
        for i, (size, strides, expansion, channels, blocks) in enumerate(_EFFICIENTNET)]
    x = layers.apply_stages(self, stages, x, train)
    x = nn.relu6(conv_norm(x, 1280, 1, names=('conv_head', 'bn2')))
    return layers.classify(self, x)
