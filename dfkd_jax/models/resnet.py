"""Residual networks for small images (He et al., arXiv:1512.03385): 3x3 stem, no max-pooling."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array

SHORTCUTS = ('projection', 'pad')
STRIDE_IN = ('3x3', '1x1')


def shrink_and_pad(x: Array, width: int, strides: int) -> Array:
  """Shortcut without parameters: option A of arXiv:1512.03385, section 3.3.

  Args:
    x: [B, H, W, C].
    width: Output channels. New channels are zero, half of them on either side.
    strides: Keeps every `strides`-th pixel.

  Returns:
    [B, ceil(H / strides), ceil(W / strides), width].
  """
  new = width - x.shape[-1]
  channels = (new // 2, new - new // 2)
  return jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), channels))


class Block(nn.Module):
  """A residual block of two 3x3 convolutions; as a bottleneck, of 1x1, 3x3 and 1x1.

  Attributes:
    width: Output channels.
    strides: Strides of the first 3x3 convolution, or of the one that `stride_in` names.
    bottleneck: Whether the inner width is a fourth of `width`.
    shortcut: 'projection' (1x1 convolution and batch norm) or 'pad', where the shape changes.
      Elsewhere the shortcut is the identity.
    projection_name: Prefix of the projection's names, `<name>_0` and `<name>_1`.
    kernel_init: Initializer of all convolutions.
    stride_in: Convolution of a bottleneck that has the strides: '3x3', or the first '1x1' as in
      the paper.
    use_bias: Whether convolutions have biases.
    epsilon: Epsilon of the batch norms.
    dtype: Dtype of the computation. None uses the dtype of parameters and inputs.
  """

  width: int
  strides: int = 1
  bottleneck: bool = False
  shortcut: str = 'projection'
  projection_name: str = 'shortcut'
  kernel_init: Callable[..., Array] = layers.uniform_fan_in
  stride_in: str = '3x3'
  use_bias: bool = False
  epsilon: float = 1e-5
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), width]."""
    conv_norm = layers.conv_norm(
        train, self.dtype, epsilon=self.epsilon, use_bias=self.use_bias,
        kernel_init=self.kernel_init)
    inner = self.width // 4 if self.bottleneck else self.width
    plan = [(inner, 3, self.strides), (self.width, 3, 1)]
    if self.bottleneck:
      first, second = (self.strides, 1) if self.stride_in == '1x1' else (1, self.strides)
      plan = [(inner, 1, first), (inner, 3, second), (self.width, 1, 1)]
    y = x
    for i, (width, size, strides) in enumerate(plan, 1):
      y = nn.relu(y) if i > 1 else y
      y = conv_norm(y, width, size, strides, names=(f'conv{i}', f'bn{i}'))
    if self.strides != 1 or x.shape[-1] != self.width:
      if self.shortcut == 'pad':
        x = shrink_and_pad(x, self.width, self.strides)
      else:
        names = (f'{self.projection_name}_0', f'{self.projection_name}_1')
        x = conv_norm(x, self.width, 1, self.strides, names=names)
    return nn.relu(y + x)


class ResNet(nn.Module):
  """ResNet-18, -34, -50 with the stem for 32x32 images of FastDFKD (arXiv:2112.06253).

  Attributes:
    num_classes: Number of logits.
    stage_sizes: Blocks of each stage; each stage but the first halves the image.
    bottleneck: Whether blocks have three convolutions, and four times the width.
    width: Channels of the stem, and of the first stage's inner convolutions.
    dtype: Dtype of the computation. None uses the dtype of parameters and inputs.
  """

  num_classes: int
  stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
  bottleneck: bool = False
  width: int = 64
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, num_classes], at least float32."""
    conv_norm = layers.conv_norm(train, self.dtype, kernel_init=layers.uniform_fan_in)
    x = nn.relu(conv_norm(x, self.width, 3, names=('conv1', 'bn1')))
    for i, size in enumerate(self.stage_sizes):
      width = self.width * 2**i * (4 if self.bottleneck else 1)
      for j in range(size):
        x = Block(
            width, 2 if i and not j else 1, self.bottleneck, dtype=self.dtype,
            name=f'layer{i + 1}_{j}')(x, train)
      self.sow('intermediates', f'stage_{i + 1}', x)
    x = layers.pool_features(self, x)
    return layers.dense(self.num_classes, x.shape[-1], name='linear')(x)
