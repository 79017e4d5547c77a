"""VGG with batch norm (Simonyan & Zisserman, arXiv:1409.1556) for small images and ImageNet."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dfkd_jax.models import layers
from dfkd_jax.types import Array

_POOLED = 7  # Pixels on either axis that ImageNet's dense layers see.
_init_normal = nn.initializers.normal(0.01)


class VGG(nn.Module):
  """Groups of 3x3 convolutions, a 2x2 max-pooling after each of the first three, a dense layer.

  As in CRD (arXiv:1910.10699) and FastDFKD, only images of height 64 are pooled once more after
  the fourth group. Then the pixels are averaged.

  Attributes:
    groups: Widths of the convolutions of each group.
  """

  num_classes: int
  groups: tuple[tuple[int, ...], ...] = ((64,), (128,), (256, 256), (512, 512), (512, 512))
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, num_classes], at least float32."""
    conv_norm = layers.conv_norm(train, self.dtype, use_bias=True)
    num_pools = 4 if x.shape[1] == 64 else 3
    for group, widths in enumerate(self.groups):
      x = _apply_group(conv_norm, f'block{group}', 0, widths, x)
      self.sow('intermediates', f'stage_{group + 1}', x)
      if group < num_pools:
        x = nn.max_pool(x, (2, 2), (2, 2))
    x = layers.pool_features(self, x)
    return nn.Dense(self.num_classes, kernel_init=_init_normal, name='classifier')(x)


class ImageNetVGG(nn.Module):
  """VGG-11, -13, -16, -19 under torchvision's names, without dropout.

  Attributes:
    groups: Widths of the convolutions of each group; a 2x2 max-pooling follows each.
    hidden: Width of the two dense layers before the last. The second one gives the features.
  """

  num_classes: int
  groups: tuple[tuple[int, ...], ...] = ((64,), (128,), (256, 256), (512, 512), (512, 512))
  hidden: int = 4096
  epsilon: float = 1e-5
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, num_classes], at least float32."""
    conv_norm = layers.conv_norm(train, self.dtype, epsilon=self.epsilon, use_bias=True)
    index = 0
    for i, widths in enumerate(self.groups, 1):
      run = functools.partial(_apply_group, conv_norm, 'features', index, widths)
      x = layers.remat_if(self, run, x, self.remat)
      self.sow('intermediates', f'stage_{i}', x)
      x = nn.max_pool(x, (2, 2), (2, 2))
      index += 3 * len(widths) + 1
    x = adaptive_mean_pool(x, _POOLED)
    x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # Channel-major, as in published weights.
    dense = functools.partial(nn.Dense, kernel_init=_init_normal)
    for name in ('classifier_0', 'classifier_3'):
      x = nn.relu(dense(self.hidden, dtype=self.dtype, name=name)(x))
    x = layers.at_least_float32(x)
    self.sow('intermediates', 'features', x)
    return dense(self.num_classes, name='classifier_6')(x)


def _apply_group(conv_norm, prefix, first, widths, x):
  """Applies convolutions, batch norms and ReLUs to maps; all three count in their names."""
  for number, width in zip(range(first, first + 3 * len(widths), 3), widths, strict=True):
    x = nn.relu(conv_norm(x, width, 3, names=(f'{prefix}_{number}', f'{prefix}_{number + 1}')))
  return x


def adaptive_mean_pool(x: Array, size: int) -> Array:
  """Averages `size` x `size` ranges of pixels that cover the maps evenly, as PyTorch does.

  The i-th range of n pixels goes from floor(i n / size) up to ceil((i + 1) n / size). Ranges
  overlap where n is no multiple of `size`, and repeat pixels where n is smaller.

  Args:
    x: [B, H, W, C].
    size: Output size on both axes.

  Returns:
    [B, size, size, C].
  """
  for axis in (1, 2):
    if x.shape[axis] != size:
      means = jnp.asarray(_range_means(x.shape[axis], size), x.dtype)
      x = jnp.tensordot(x, means, ((axis,), (1,)), precision=lax.Precision.HIGHEST)
      x = jnp.moveaxis(x, -1, axis)
  return x


def _range_means(pixels: int, size: int) -> np.ndarray:
  """Matrix [size, pixels] that averages the ranges of an axis."""
  matrix = np.zeros((size, pixels))
  for i in range(size):
    start, stop = i * pixels // size, math.ceil((i + 1) * pixels / size)
    matrix[i, start:stop] = 1 / (stop - start)
  return matrix
