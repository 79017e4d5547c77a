"""EfficientNet-Lite (Tan & Le, arXiv:1905.11946, with ReLU6 and no squeeze-and-excitation)."""

import functools
import math
from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.mobilenet import round_channels
from dfkd_jax.types import Array

# Table 1 of the paper: depthwise kernel size, strides, expansion, channels and blocks of a stage.
_STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))
_STEM, _HEAD = 32, 1280  # Channels, in every size of Lite.
PADDINGS = ('same', 'torch')


class Block(nn.Module):
  """Expansion `conv_pw`, depthwise `conv_dw`, projection `conv_pwl`.

  Without expansion, the projection is called `conv_pw`.

  Attributes:
    width: Output channels.
    size: Size of the depthwise kernel.
    strides: Strides of the depthwise convolution.
    expansion: Inner channels per input channel; 1 leaves the first convolution out.
    padding: 'same' or 'torch', see `EfficientNetLite`.
    epsilon: Epsilon of the batch norms.
    momentum: Momentum of the batch norms.
    dtype: Dtype of the computation. None uses the dtype of parameters and inputs.
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
    conv_norm = layers.conv_norm(
        train, self.dtype, epsilon=self.epsilon, momentum=self.momentum)
    inner, y, number = self.expansion * x.shape[-1], x, 1
    if self.expansion != 1:
      y, number = nn.relu6(conv_norm(y, inner, 1, names=('conv_pw', 'bn1'))), 2
    y = nn.relu6(conv_norm(
        y, inner, self.size, self.strides, names=('conv_dw', f'bn{number}'),
        feature_group_count=inner, **_padding(self.padding)))
    projection = 'conv_pwl' if number == 2 else 'conv_pw'
    y = conv_norm(y, self.width, 1, names=(projection, f'bn{number + 1}'))
    return x + y if self.strides == 1 and x.shape[-1] == self.width else y


class EfficientNetLite(nn.Module):
  """EfficientNet-Lite under timm's names; without dropout and without dropping of blocks.

  Lite0, 1 and 2 were published for 224, 240 and 260 pixels, with images (x - 127) / 128 of bytes.

  Attributes:
    num_classes: Number of logits.
    width: Factor of the channels of all stages, but not of stem and head.
    depth: Factor of the number of blocks, except in the first and last stage.
    padding: 'same' as in TensorFlow, where strides pad more at the end, or 'torch', which pads
      both sides alike. Weights trained with one lose some accuracy with the other.
    epsilon: Epsilon of the batch norms.
    momentum: Momentum of the batch norms.
    remat: Whether the backward pass keeps only the input of each block.
    dtype: Dtype of the computation. None uses the dtype of parameters and inputs.

  Raises:
    ValueError: `padding` is unknown.
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
    """Normalized images [B, H, W, C] to logits [B, num_classes], at least float32."""
    norm = {'epsilon': self.epsilon, 'momentum': self.momentum}
    conv_norm = layers.conv_norm(train, self.dtype, **norm)
    x = nn.relu6(conv_norm(
        x, _STEM, 3, 2, names=('conv_stem', 'bn1'), **_padding(self.padding)))
    for i, (size, strides, expansion, channels, blocks) in enumerate(_STAGES):
      if 0 < i < len(_STAGES) - 1:
        blocks = math.ceil(self.depth * blocks)
      for j in range(blocks):
        block = functools.partial(
            Block, round_channels(channels * self.width), size, 1 if j else strides, expansion,
            self.padding, dtype=self.dtype, name=f'blocks_{i}_{j}', **norm)
        run = functools.partial(layers.apply_block, block, train)
        x = layers.remat_if(self, run, x, self.remat)
      self.sow('intermediates', f'stage_{i + 1}', x)
    x = nn.relu6(conv_norm(x, _HEAD, 1, names=('conv_head', 'bn2')))
    x = layers.pool_features(self, x)
    return layers.dense(self.num_classes, x.shape[-1], name='classifier')(x)


def _padding(name: str) -> dict[str, str]:
  """Options of a convolution; by default it pads as PyTorch does."""
  return {'padding': 'SAME'} if name == 'same' else {}
