"""VGG with batch norm (Simonyan & Zisserman, arXiv:1409.1556), and a smaller plain network."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dfkd_jax.models import layers
from dfkd_jax.types import Array

_GROUPS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class ConvNet(nn.Module):
  """Convolutions, a mean and a dense layer: for small data sets, such as 28x28 grey images."""

  head = 'fc'
  num_classes: int
  widths: tuple[int, ...] = (16, 32, 32, 64, 80)  # Of the 3x3 convolutions.
  strides: tuple[int, ...] = (1, 2, 1, 2, 1)
  dtype: Any = None
  head_width: int | None = None

  def __post_init__(self) -> None:
    if len(self.widths) != len(self.strides):
      raise ValueError(
          f'{len(self.widths)} widths {self.widths} need as many strides, not {self.strides}.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    conv_norm = functools.partial(layers.conv_norm, self, train=train)
    for i, (width, strides) in enumerate(zip(self.widths, self.strides, strict=True), 1):
      x = nn.relu(conv_norm(x, width, 3, strides, names=(f'conv{i}', f'bn{i}')))
      self.sow('intermediates', f'stage_{i}', x)
    return layers.classify(self, x)


class VGG(nn.Module):
  """Groups of convolutions, a 2x2 max-pooling after each of the first three, a dense layer.

  As in CRD (arXiv:1910.10699) and FastDFKD, only images of height 64 are pooled once more after
  the fourth group. Then the pixels are averaged.
  """

  head = 'classifier'
  num_classes: int
  groups: tuple[tuple[int, ...], ...] = _GROUPS  # Widths of the 3x3 convolutions of each group.
  dtype: Any = None
  head_width: int | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    conv_norm = functools.partial(layers.conv_norm, self, train=train, use_bias=True)
    num_pools = 4 if x.shape[1] == 64 else 3
    for group, widths in enumerate(self.groups):
      x = _apply_group(conv_norm, f'block{group}', 0, widths, x)
      self.sow('intermediates', f'stage_{group + 1}', x)
      if group < num_pools:
        x = nn.max_pool(x, (2, 2), (2, 2))
    return layers.classify(self, x, **layers.normal_inits)


class ImageNetVGG(nn.Module):
  """VGG-11, -13, -16, -19 under torchvision's names, without dropout."""

  head = 'classifier_6'
  num_classes: int
  groups: tuple[tuple[int, ...], ...] = _GROUPS  # As in `VGG`; a 2x2 max-pooling follows each.
  hidden: int | None = 4096  # Width of the two dense layers before the last. None: there are none.
  epsilon: float = 1e-5
  remat: bool = False
  dtype: Any = None
  head_width: int | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    conv_norm = functools.partial(layers.conv_norm, self, train=train, use_bias=True)
    index = 0
    for i, widths in enumerate(self.groups, 1):
      run = functools.partial(_apply_group, conv_norm, 'features', index, widths)
      x = layers.apply_block(self, run, x)
      self.sow('intermediates', f'stage_{i}', x)
      x = nn.max_pool(x, (2, 2), (2, 2))
      index += 3 * len(widths) + 1
    x = adaptive_mean_pool(x, 7).transpose(0, 3, 1, 2)  # Channel-major, as in published weights.
    x = x.reshape(x.shape[0], -1)
    dense = functools.partial(nn.Dense, **layers.normal_inits)
    for name in ('classifier_0', 'classifier_3') if self.hidden is not None else ():
      x = nn.relu(dense(self.hidden, dtype=self.dtype, name=name)(x))
    return layers.apply_head(self, layers.at_least_float32(x), **layers.normal_inits)


def _apply_group(conv_norm, prefix, first, widths, x):
  """Applies convolutions, batch norms and ReLUs to maps; all three count in their names."""
  for number, width in zip(range(first, first + 3 * len(widths), 3), widths, strict=True):
    x = nn.relu(conv_norm(x, width, 3, names=(f'{prefix}_{number}', f'{prefix}_{number + 1}')))
  return x


def adaptive_mean_pool(x: Array, size: int) -> Array:
  """Averages ranges of pixels of [B, H, W, C] to [B, size, size, C], as PyTorch does.

  The i-th range of n pixels goes from floor(i n / size) up to ceil((i + 1) n / size). Ranges
  overlap where n is no multiple of `size`, and repeat pixels where n is smaller.
  """
  for axis in (1, 2):
    pixels = x.shape[axis]
    if pixels != size:
      means = np.zeros((size, pixels))
      for i in range(size):
        start, stop = i * pixels // size, math.ceil((i + 1) * pixels / size)
        means[i, start:stop] = 1 / (stop - start)
      x = jnp.tensordot(
          x, jnp.asarray(means, x.dtype), ((axis,), (1,)), precision=lax.Precision.HIGHEST)
      x = jnp.moveaxis(x, -1, axis)
  return x
