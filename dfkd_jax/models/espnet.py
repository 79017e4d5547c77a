"""ESPNet: segmentation by spatial pyramids of dilated convolutions.

References:
  Mehta et al., ESPNet: Efficient Spatial Pyramid of Dilated Convolutions for Semantic
  Segmentation, ECCV 2018, https://arxiv.org/abs/1803.06815.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.dense_layers import (
    PReLU,
    TransposedConv,
    average_pool,
    enlarge,
    pad_to_multiple,
    sow_features,
)
from dfkd_jax.types import Array

RATES = (1, 2, 4, 8, 16)  # Dilations of the parallel branches.
STRIDE = 8  # Of the third level.


class ESPBlock(nn.Module):
  """Reduces channels, applies parallel dilated convolutions, and fuses them hierarchically.

  The branches of rates 2 to 16 are added up from the smallest rate on, which avoids gridding
  (section 3.2 of the paper). They follow the branch of rate 1.

  Attributes:
    width: Output channels. A branch has width // 5, the first one the rest. With fewer than 5,
      there is a branch of one channel for each, of the smallest rates.
    strides: 2 for a down-sampler, whose reduction is a 3x3 convolution of this stride.
    residual: Whether to add the input, which must have `width` channels.
  """

  width: int
  strides: int = 1
  residual: bool = False
  epsilon: float = 1e-3
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), width]."""
    rates, size = RATES[:self.width], 1 if self.strides == 1 else 3
    branch = self.width // len(rates)
    reduced = _conv(branch, size, 'c1_conv', self.dtype, strides=self.strides)(x)
    others = [branch] * (len(rates) - 1)
    widths = [self.width - sum(others), *others]
    branches = [_conv(width, 3, f'd{rate}_conv', self.dtype, rate=rate)(reduced)
                for rate, width in zip(rates, widths, strict=True)]
    for i in range(2, len(rates)):
      branches[i] += branches[i - 1]
    y = jnp.concatenate(branches, axis=-1)
    names = 'bn_bn', 'bn_act'
    if self.strides > 1:
      names = 'bn', 'act'
    return _norm_act(x + y if self.residual else y, names, train, self.epsilon, self.dtype)


class ESPEncoder(nn.Module):
  """ESPNet's encoder, known as ESPNet-C; its logits are enlarged eightfold, bilinearly.

  Attributes:
    p: ESP blocks of the second level.
    q: ESP blocks of the third level.
    widths: Channels of the three levels.
  """

  num_classes: int
  p: int = 2
  q: int = 8
  widths: tuple[int, int, int] = (16, 64, 128)
  epsilon: float = 1e-3
  remat: bool = False
  dtype: Any = None

  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, H, W, num_classes]."""
    height, width = x.shape[1:3]
    *_, features, logits = self.levels(pad_to_multiple(x, STRIDE), train)
    sow_features(self, features)
    size = STRIDE * logits.shape[1], STRIDE * logits.shape[2]
    return enlarge(logits, size)[:, :height, :width]

  @nn.compact
  def levels(self, x: Array, train: bool) -> tuple[Array, Array, Array, Array, Array]:
    """Returns the maps of level 1, these with the image, level 2, level 3, and the logits."""
    settings = {'epsilon': self.epsilon, 'dtype': self.dtype}
    half = average_pool(x)
    quarter = average_pool(half)
    level1 = _conv_norm_act(x, self.widths[0], 'level1', train, **settings, strides=2)
    x1 = _norm_act(jnp.concatenate([level1, half], -1), ('b1_bn', 'b1_act'), train, **settings)
    x2 = self._level(x1, 2, self.p, train)
    x2 = jnp.concatenate([*x2, quarter], -1)
    x2 = _norm_act(x2, ('b2_bn', 'b2_act'), train, **settings)
    x3 = jnp.concatenate(self._level(x2, 3, self.q, train), -1)
    x3 = _norm_act(x3, ('b3_bn', 'b3_act'), train, **settings)
    return level1, x1, x2, x3, _conv(self.num_classes, 1, 'classifier_conv', self.dtype)(x3)

  def _level(self, x: Array, level: int, number: int, train: bool) -> tuple[Array, Array]:
    """Returns the maps after the blocks of a level, and those of its down-sampler."""
    settings = {'epsilon': self.epsilon, 'dtype': self.dtype}
    width = self.widths[level - 1]
    first = ESPBlock(width, 2, name=f'down{level}', **settings)(x, train)
    y = first
    for i in range(number):
      block = ESPBlock(width, residual=True, name=f'level{level}_{i}', **settings)
      y = layers.apply_block(self, lambda y, block=block: block(y, train), y)
    return (first, y) if level == 3 else (y, first)


class ESPNet(nn.Module):
  """ESPNet: its encoder, and a decoder to full resolution. Heights and widths are padded to 8.

  Published for CamVid with `(255 x - mean) / std / 255` of BGR images as the input.

  Attributes:
    p, q, widths: See `ESPEncoder`.
    skip: Maps of level 1 that join the decoder: 'image' (with the image, the authors' CamVid), or
      'plain' (their Cityscapes).
  """

  num_classes: int
  p: int = 2
  q: int = 8
  widths: tuple[int, int, int] = (16, 64, 128)
  skip: str = 'image'
  epsilon: float = 1e-3
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, H, W, num_classes], at least float32."""
    height, width = x.shape[1:3]
    settings = {'epsilon': self.epsilon, 'dtype': self.dtype}
    encoder = ESPEncoder(self.num_classes, self.p, self.q, self.widths, remat=self.remat,
                         name='encoder', **settings)
    level1, x1, x2, x3, logits = encoder.levels(pad_to_multiple(x, STRIDE), train)
    for i, maps in enumerate((x1, x2, x3), 1):
      self.sow('intermediates', f'stage_{i}', maps)
    sow_features(self, x3)
    double = lambda name: TransposedConv(self.num_classes, dtype=self.dtype, name=name)
    u3 = double('up_l3_0')(layers.BatchNorm(
        use_running_average=not train, name='br', **settings)(logits))
    c = jnp.concatenate([_conv(self.num_classes, 1, 'level3_C_conv', self.dtype)(x2), u3], -1)
    c = _norm_act(c, ('combine_l2_l3_0_bn', 'combine_l2_l3_0_act'), train, **settings)
    c = ESPBlock(self.num_classes, name='combine_l2_l3_1', **settings)(c, train)
    u2 = _norm_act(double('up_l2_0')(c), ('up_l2_1_bn', 'up_l2_1_act'), train, **settings)
    y = jnp.concatenate([u2, x1 if self.skip == 'image' else level1], -1)
    y = _conv_norm_act(y, self.num_classes, 'conv', train, **settings)
    return layers.at_least_float32(double('classifier')(y)[:, :height, :width])


def _conv(width, size, name, dtype, strides=1, rate=1):
  return layers.Conv(
      width, (size, size), strides, padding=rate * (size // 2), kernel_dilation=rate,
      use_bias=False, kernel_init=layers.uniform_fan_in, dtype=dtype, name=name)


def _norm_act(x, names, train, epsilon, dtype):
  norm = layers.BatchNorm(
      use_running_average=not train, epsilon=epsilon, dtype=dtype, name=names[0])
  return PReLU(name=names[1])(norm(x))


def _conv_norm_act(x, width, name, train, epsilon, dtype, strides=1):
  x = _conv(width, 3, f'{name}_conv', dtype, strides)(x)
  return _norm_act(x, (f'{name}_bn', f'{name}_act'), train, epsilon, dtype)
