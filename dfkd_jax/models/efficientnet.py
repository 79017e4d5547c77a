"""EfficientNet-Lite (Tan & Le, arXiv:1905.11946, without squeeze-and-excitation and with ReLU6)."""

import functools
import math
from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.mobilenet import round_channels
from dfkd_jax.types import Array

# Table 1 of the paper: size of the depthwise kernel, strides, expansion, channels and blocks of each stage.
_STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1))
_STEM, _HEAD = 32, 1280  # Of every size of Lite.
PADDINGS = ('same', 'torch')


class Block(nn.Module):
  """Expansion `conv_pw`, depthwise `conv_dw` and projection `conv_pwl`; without expansion the latter is `conv_pw`.

  Attributes:
    width: Channels that come out.
    size: Of the depthwise kernel.
    strides: Of the depthwise convolution.
    expansion: Channels within, per channel that comes in; 1 leaves the first convolution out.
    padding: 'same' or 'torch'.
    epsilon: Of the batch norms.
    momentum: Of the batch norms.
    dtype: Of the computation; None for that of parameters and inputs.
  """

  width: int
  size: int
  strides: int = 1
  expansion: int = 6
  padding: str = 'same'
  epsilon: float = 1e-3
  momentum: float = 0.99
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), width]."""
    unit = functools.partial(
        _conv_norm, padding=self.padding, train=train, epsilon=self.epsilon, momentum=self.momentum, dtype=self.dtype)
    inner, y, at = self.expansion * x.shape[-1], x, 1
    if self.expansion != 1:
      y, at = nn.relu6(unit(y, inner, 1, names=('conv_pw', 'bn1'))), 2
    y = nn.relu6(unit(y, inner, self.size, self.strides, groups=inner, names=('conv_dw', f'bn{at}')))
    y = unit(y, self.width, 1, names=('conv_pwl' if at == 2 else 'conv_pw', f'bn{at + 1}'))
    return x + y if self.strides == 1 and x.shape[-1] == self.width else y


class EfficientNetLite(nn.Module):
  """EfficientNet-Lite under the names that timm gives its parts; without dropout and without dropping of blocks.

  Lite0, 1 and 2 were published for 224, 240 and 260 pixels, with images as (x - 127) / 128 of 0 to 255.

  Attributes:
    num_classes: Of the logits.
    width: Factor of the channels of all stages, but not of stem and head.
    depth: Factor of the blocks of all stages but the first and the last.
    padding: 'same' as TensorFlow has it, where strides pad more at the end, or
      'torch', alike on both sides; weights trained with one lose some accuracy with the other.
    epsilon: Of the batch norms.
    momentum: Of the batch norms.
    remat: Keep only the input of each block for the backward pass.
    dtype: Of the computation; None for that of parameters and inputs.

  Raises:
    ValueError: If `padding` is neither.
  """

  num_classes: int
  width: float = 1.0
  depth: float = 1.0
  padding: str = 'same'
  epsilon: float = 1e-3
  momentum: float = 0.99
  remat: bool = False
  dtype: Any = None

  def __post_init__(self) -> None:
    if self.padding not in PADDINGS:
      raise ValueError(f'Unknown padding {self.padding!r}; there are {", ".join(PADDINGS)}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalised images [B, H, W, C] to logits [B, num_classes], at least float32."""
    shared = {'padding': self.padding, 'epsilon': self.epsilon, 'momentum': self.momentum, 'dtype': self.dtype}
    x = nn.relu6(_conv_norm(x, _STEM, 3, 2, names=('conv_stem', 'bn1'), train=train, **shared))
    for i, (size, strides, expansion, channels, blocks) in enumerate(_STAGES):
      if 0 < i < len(_STAGES) - 1:
        blocks = math.ceil(self.depth * blocks)
      for j in range(blocks):
        block = functools.partial(
            Block, round_channels(channels * self.width), size, 1 if j else strides, expansion,
            name=f'blocks_{i}_{j}', **shared)
        x = layers.remat_if(self, functools.partial(_run, block, train), x, self.remat)
      self.sow('intermediates', f'stage_{i + 1}', x)
    x = nn.relu6(_conv_norm(x, _HEAD, 1, names=('conv_head', 'bn2'), train=train, **shared))
    x = layers.pool_features(self, x)
    return layers.dense(self.num_classes, x.shape[-1], name='classifier')(x)


def _run(block, train, x):
  return block()(x, train)


def _conv_norm(x, width, size, strides=1, *, groups=1, names, padding, train, epsilon, momentum, dtype):
  """Convolution and batch norm by their two names."""
  x = layers.Conv(
      width, (size, size), strides, padding='SAME' if padding == 'same' else size // 2, feature_group_count=groups,
      use_bias=False, kernel_init=layers.he_fan_out, dtype=dtype, name=names[0])(x)
  return layers.BatchNorm(
      use_running_average=not train, epsilon=epsilon, momentum=momentum, dtype=dtype, name=names[1])(x)
