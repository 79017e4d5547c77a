"""Residual networks (He et al., arXiv:1512.03385), also wide ones (arXiv:1605.07146)."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.messages import check_choice
from dfkd_jax.models import layers
from dfkd_jax.types import Array

_STEM = ('conv1', 'bn1')
_DOWNSAMPLE = {'projection_name': 'downsample', 'kernel_init': layers.he_fan_out}


def shrink_and_pad(x: Array, width: int, strides: int) -> Array:
  """Keeps every `strides`-th pixel, and adds channels of zeros on both sides: option A (3.3)."""
  new = width - x.shape[-1]
  return jnp.pad(x[:, ::strides, ::strides], ((0, 0),) * 3 + ((new // 2, new - new // 2),))


class Block(nn.Module):
  """A residual block of two 3x3 convolutions; as a bottleneck, of 1x1, 3x3 and 1x1.

  Where the shape changes, the shortcut is a 'projection' (1x1 convolution `<projection_name>_0`
  and batch norm `<projection_name>_1`) or a 'pad'. Elsewhere it is the identity.
  """

  width: int  # The inner width of a bottleneck is a fourth.
  strides: int = 1
  bottleneck: bool = False
  shortcut: str = 'projection'
  projection_name: str = 'shortcut'
  kernel_init: Callable[..., Array] = layers.uniform_fan_in
  stride_in: str = '3x3'  # Convolution of a bottleneck that has the strides, or the first '1x1'.
  use_bias: bool = False  # Of the convolutions.
  rate: int = 1  # Dilation of the 3x3 convolutions.
  epsilon: float = 1e-5
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    conv_norm = functools.partial(
        layers.conv_norm, self, train=train, use_bias=self.use_bias, kernel_init=self.kernel_init)
    check_choice(self.stride_in, ('3x3', '1x1'), 'stride_in')
    check_choice(self.shortcut, ('projection', 'pad'), 'shortcut')
    plan = [(self.width, 3, self.strides), (self.width, 3, 1)]
    if self.bottleneck:
      inner = self.width // 4
      first, second = (self.strides, 1) if self.stride_in == '1x1' else (1, self.strides)
      plan = [(inner, 1, first), (inner, 3, second), (self.width, 1, 1)]
    y = x
    for i, (width, size, strides) in enumerate(plan, 1):
      y = conv_norm(nn.relu(y) if i > 1 else y, width, size, strides, names=(f'conv{i}', f'bn{i}'),
                    rate=self.rate if size == 3 else 1)
    if self.strides != 1 or x.shape[-1] != self.width:
      if self.shortcut == 'pad':
        x = shrink_and_pad(x, self.width, self.strides)
      else:
        names = (f'{self.projection_name}_0', f'{self.projection_name}_1')
        x = conv_norm(x, self.width, 1, self.strides, names=names)
    return nn.relu(y + x)


class ResNet(nn.Module):
  """ResNet-18, -34, -50 with the stem for 32x32 images of FastDFKD (arXiv:2112.06253)."""

  head = 'linear'
  num_classes: int
  stage_sizes: tuple[int, ...] = (2, 2, 2, 2)  # Blocks of each stage.
  bottleneck: bool = False  # Blocks of three convolutions, and four times the width.
  width: int = 64  # Channels of the stem, and of the first stage's inner convolutions.
  dtype: Any = None
  head_width: int | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    x = nn.relu(layers.conv_norm(
        self, x, self.width, 3, train=train, names=_STEM, kernel_init=layers.uniform_fan_in))
    x = _apply_blocks(self, _stages(self), x, train, bottleneck=self.bottleneck)
    return layers.classify(self, x)


class ImageNetResNet(nn.Module):
  """ResNet-18, -34, -50 for ImageNet under torchvision's names: 7x7 stem and max-pooling.

  Keras' ResNet-50 follows the paper: strides in the first 1x1 convolution of a bottleneck, biases
  in all convolutions, epsilon 1.001e-5.
  """

  head = 'fc'
  num_classes: int
  stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
  bottleneck: bool = False
  width: int = 64
  stride_in: str = '3x3'
  conv_bias: bool = False
  epsilon: float = 1e-5
  remat: bool = False
  dtype: Any = None
  head_width: int | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    x = nn.relu(layers.conv_norm(
        self, x, self.width, 7, 2, train=train, names=_STEM, use_bias=self.conv_bias))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    x = _apply_blocks(
        self, _stages(self), x, train, bottleneck=self.bottleneck, stride_in=self.stride_in,
        epsilon=self.epsilon, use_bias=self.conv_bias, **_DOWNSAMPLE)
    return layers.classify(self, x)


class ThinResNet(nn.Module):
  """ResNet of 6n + 2 layers in three stages, such as ResNet-20 and -110 (section 4.2)."""

  head = 'fc'
  num_classes: int
  depth: int = 20
  widths: tuple[int, int, int, int] = (16, 16, 32, 64)  # Of the stem, then of the three stages.
  shortcut: str = 'projection'  # As in CRD (arXiv:1910.10699) and FastDFKD; or 'pad', the paper's.
  dtype: Any = None
  head_width: int | None = None

  def __post_init__(self) -> None:
    if self.depth < 8 or self.depth % 6 != 2:
      raise ValueError(f'A thin ResNet has 6n + 2 layers (8, 14, 20, ...), not {self.depth}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    x = nn.relu(layers.conv_norm(self, x, self.widths[0], 3, train=train, names=_STEM))
    stages = zip(self.widths[1:], [(self.depth - 2) // 6] * 3, strict=True)
    x = _apply_blocks(self, stages, x, train, shortcut=self.shortcut, **_DOWNSAMPLE)
    return layers.classify(self, x)


def _stages(module: ResNet | ImageNetResNet) -> list[tuple[int, int]]:
  """Output channels and number of blocks of each stage."""
  width = 4 * module.width if module.bottleneck else module.width
  return [(width * 2**stage, size) for stage, size in enumerate(module.stage_sizes)]


def _apply_blocks(module, stages, x, train, block=Block, name='layer{}_{}', **options):
  """Applies `stages` of (width, number of blocks); all but the first halve the maps."""
  return layers.apply_stages(module, [
      [functools.partial(block, width, 2 if stage > 1 and i == 0 else 1, dtype=module.dtype,
                         name=name.format(stage, i), **options) for i in range(size)]
      for stage, (width, size) in enumerate(stages, 1)], x, train)


class WideBlock(nn.Module):
  """Batch norm and ReLU before each of two 3x3 convolutions; the first has the strides."""

  width: int
  strides: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
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
  """WRN-depth-widen: three groups of (depth - 4) / 6 blocks, no dropout."""

  head = 'fc'
  num_classes: int
  depth: int = 16  # Number of layers, 6n + 4.
  widen: int = 1  # Factor of the widths 16, 32 and 64.
  dtype: Any = None
  head_width: int | None = None

  def __post_init__(self) -> None:
    if self.depth < 10 or self.depth % 6 != 4:
      raise ValueError(
          f'A wide ResNet has 6n + 4 layers (10, 16, 22, 28, 40, ...), not {self.depth}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    x = layers.Conv(
        16, (3, 3), padding=1, use_bias=False, kernel_init=layers.he_fan_out, dtype=self.dtype,
        name='conv1')(x)
    groups = [(width * self.widen, (self.depth - 4) // 6) for width in (16, 32, 64)]
    x = _apply_blocks(self, groups, x, train, WideBlock, 'block{}_layer_{}')
    norm = layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name='bn1')
    return layers.classify(self, nn.relu(norm(x)), bias_init=nn.initializers.zeros)
