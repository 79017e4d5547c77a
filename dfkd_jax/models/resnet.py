"""Residual blocks (He et al., arXiv:1512.03385), and networks of them for small images: 3x3 stem, no max-pooling."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array

SHORTCUTS = ('projection', 'pad')
STRIDE_IN = ('3x3', '1x1')


def shrink_and_pad(x: Array, width: int, strides: int) -> Array:
  """Option A of arXiv:1512.03385, section 3.3: a shortcut without parameters.

  Args:
    x: [B, H, W, C].
    width: Channels to come out; those that are new are zero, half on either side.
    strides: Every how many-th pixel is kept.

  Returns:
    [B, ceil(H / strides), ceil(W / strides), width].
  """
  new = width - x.shape[-1]
  return jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


class Block(nn.Module):
  """A residual block, two 3x3 convolutions or, as a bottleneck, 1x1, 3x3 and 1x1.

  Attributes:
    width: Channels that come out.
    strides: Of the first 3x3 convolution, or of what `stride_in` says.
    bottleneck: Whether its inner width is a fourth of `width`.
    shortcut: 'projection' (1x1 convolution and batch norm) or 'pad', where the
      shape changes; elsewhere the identity.
    projection_name: What the projection is called: `<name>_0` and `<name>_1`.
    kernel_init: Of all convolutions.
    stride_in: Which convolution of a bottleneck has the strides: '3x3', or the
      first '1x1' as in the paper.
    use_bias: Of all convolutions.
    epsilon: Of the batch norms.
    dtype: Of the computation; None for that of parameters and inputs.
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
    conv = functools.partial(
        layers.Conv, use_bias=self.use_bias, kernel_init=self.kernel_init, dtype=self.dtype)
    norm = functools.partial(
        layers.BatchNorm, use_running_average=not train, epsilon=self.epsilon, dtype=self.dtype)
    inner = self.width // 4 if self.bottleneck else self.width
    plan = [(inner, 3, self.strides), (self.width, 3, 1)]
    if self.bottleneck:
      first, second = (self.strides, 1) if self.stride_in == '1x1' else (1, self.strides)
      plan = [(inner, 1, first), (inner, 3, second), (self.width, 1, 1)]
    y = x
    for i, (width, size, strides) in enumerate(plan, 1):
      y = nn.relu(y) if i > 1 else y
      y = conv(width, (size, size), strides, padding=size // 2, name=f'conv{i}')(y)
      y = norm(name=f'bn{i}')(y)
    if self.strides != 1 or x.shape[-1] != self.width:
      if self.shortcut == 'pad':
        x = shrink_and_pad(x, self.width, self.strides)
      else:
        x = conv(self.width, (1, 1), self.strides, padding=0, name=f'{self.projection_name}_0')(x)
        x = norm(name=f'{self.projection_name}_1')(x)
    return nn.relu(y + x)


class ResNet(nn.Module):
  """ResNet-18, -34, -50 with the stem for 32x32 images, as FastDFKD (arXiv:2112.06253) has them.

  Attributes:
    num_classes: Of the logits.
    stage_sizes: Blocks of each stage; each stage but the first halves the image.
    bottleneck: Blocks of three convolutions, four times as wide.
    width: Of the stem, and of the first stage's inner convolutions.
    dtype: Of the computation; None for that of parameters and inputs.
  """

  num_classes: int
  stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
  bottleneck: bool = False
  width: int = 64
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalised images [B, H, W, C] to logits [B, num_classes], at least float32."""
    x = layers.Conv(
        self.width, (3, 3), padding=1, use_bias=False, kernel_init=layers.uniform_fan_in,
        dtype=self.dtype, name='conv1')(x)
    x = nn.relu(layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name='bn1')(x))
    for i, size in enumerate(self.stage_sizes):
      width = self.width * 2**i * (4 if self.bottleneck else 1)
      for j in range(size):
        strides = 2 if i and not j else 1
        x = Block(width, strides, self.bottleneck, dtype=self.dtype, name=f'layer{i + 1}_{j}')(x, train)
      self.sow('intermediates', f'stage_{i + 1}', x)
    x = layers.pool_features(self, x)
    return layers.dense(self.num_classes, x.shape[-1], name='linear')(x)
