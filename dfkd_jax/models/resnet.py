"""Residual networks (He et al., arXiv:1512.03385) for small images and for ImageNet."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.types import Array

SHORTCUTS = ('projection', 'pad')
STRIDE_IN = ('3x3', '1x1')
_DOWNSAMPLE = {'projection_name': 'downsample', 'kernel_init': layers.he_fan_out}


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


def _apply_stages(module, x, train, widths, sizes, *, remat=False, **options):
  """Applies stages of blocks `layer<stage>_<index>` to maps; all but the first halve them."""
  for stage, (width, size) in enumerate(zip(widths, sizes, strict=True), 1):
    for i in range(size):
      block = functools.partial(
          Block, width, 2 if stage > 1 and i == 0 else 1, dtype=module.dtype,
          name=f'layer{stage}_{i}', **options)
      x = layers.remat_if(module, functools.partial(layers.apply_block, block, train), x, remat)
    module.sow('intermediates', f'stage_{stage}', x)
  return layers.pool_features(module, x)


class ResNet(nn.Module):
  """ResNet-18, -34, -50 with the stem for 32x32 images of FastDFKD (arXiv:2112.06253).

  Attributes:
    stage_sizes: Blocks of each stage.
    bottleneck: Whether blocks have three convolutions, and four times the width.
    width: Channels of the stem, and of the first stage's inner convolutions.
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
    x = _apply_stages(
        self, x, train, _stage_widths(self), self.stage_sizes, bottleneck=self.bottleneck)
    return layers.dense(self.num_classes, x.shape[-1], name='linear')(x)


class ImageNetResNet(nn.Module):
  """ResNet-18, -34, -50 for ImageNet under torchvision's names: 7x7 stem and max-pooling.

  Keras' ResNet-50 follows the paper: strides in the first 1x1 convolution of a bottleneck, biases
  in all convolutions, epsilon 1.001e-5.

  Attributes:
    stage_sizes: Blocks of each stage.
    bottleneck: Whether blocks have three convolutions, and four times the width.
    width: Channels of the stem, and of the first stage's inner convolutions.
    stride_in: Convolution of a bottleneck that has the strides, '3x3' or '1x1'.
    conv_bias: Whether convolutions have biases.

  Raises:
    ValueError: `stride_in` is unknown.
  """

  num_classes: int
  stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
  bottleneck: bool = False
  width: int = 64
  stride_in: str = '3x3'
  conv_bias: bool = False
  epsilon: float = 1e-5
  remat: bool = False
  dtype: Any = None

  def __post_init__(self) -> None:
    if self.stride_in not in STRIDE_IN:
      raise ValueError(f'Unknown stride_in {self.stride_in!r}; there are {", ".join(STRIDE_IN)}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, num_classes], at least float32."""
    options = {'epsilon': self.epsilon, 'use_bias': self.conv_bias}
    conv_norm = layers.conv_norm(train, self.dtype, **options)
    x = nn.relu(conv_norm(x, self.width, 7, 2, names=('conv1', 'bn1')))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    x = _apply_stages(
        self, x, train, _stage_widths(self), self.stage_sizes, remat=self.remat,
        bottleneck=self.bottleneck, stride_in=self.stride_in, **options, **_DOWNSAMPLE)
    return layers.dense(self.num_classes, x.shape[-1], name='fc')(x)


class ThinResNet(nn.Module):
  """ResNet of 6n + 2 layers in three stages, such as ResNet-20 and -110 (section 4.2).

  Attributes:
    depth: Number of layers, 6n + 2.
    widths: Channels of the stem, then of the three stages.
    shortcut: 'projection' (as in CRD, arXiv:1910.10699, and FastDFKD) or 'pad', which has no
      parameters (option A of the paper).

  Raises:
    ValueError: `depth` is not 6n + 2, or `shortcut` is unknown.
  """

  num_classes: int
  depth: int = 20
  widths: tuple[int, int, int, int] = (16, 16, 32, 64)
  shortcut: str = 'projection'
  dtype: Any = None

  def __post_init__(self) -> None:
    if self.depth < 8 or self.depth % 6 != 2:
      raise ValueError(f'A thin ResNet has 6n + 2 layers (8, 14, 20, ...), not {self.depth}.')
    if self.shortcut not in SHORTCUTS:
      raise ValueError(f'Unknown shortcut {self.shortcut!r}; there are {", ".join(SHORTCUTS)}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, num_classes], at least float32."""
    conv_norm = layers.conv_norm(train, self.dtype)
    x = nn.relu(conv_norm(x, self.widths[0], 3, names=('conv1', 'bn1')))
    sizes = [(self.depth - 2) // 6] * 3
    x = _apply_stages(
        self, x, train, self.widths[1:], sizes, shortcut=self.shortcut, **_DOWNSAMPLE)
    return layers.dense(self.num_classes, x.shape[-1], name='fc')(x)


def _stage_widths(module: ResNet | ImageNetResNet) -> list[int]:
  """Output channels of each stage."""
  factor = 4 if module.bottleneck else 1
  return [module.width * 2**stage * factor for stage in range(len(module.stage_sizes))]
