"""VGG with batch norm for ImageNet (Simonyan & Zisserman, arXiv:1409.1556)."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dfkd_jax.models import layers
from dfkd_jax.types import Array

_POOLED = 7  # Pixels on either axis that the dense layers see.


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


class ImageNetVGG(nn.Module):
  """VGG-11, -13, -16, -19 under torchvision's names, without dropout.

  Attributes:
    num_classes: Number of logits.
    groups: Widths of the convolutions of each group; a 2x2 max-pooling follows each.
    hidden: Width of the two dense layers before the last. The second one gives the features.
    epsilon: Epsilon of the batch norms.
    remat: Whether the backward pass keeps only the input of each group.
    dtype: Dtype of the computation. None uses the dtype of parameters and inputs.
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
      run = functools.partial(_apply_group, conv_norm, widths, index)
      x = layers.remat_if(self, run, x, self.remat)
      self.sow('intermediates', f'stage_{i}', x)
      x = nn.max_pool(x, (2, 2), (2, 2))
      index += 3 * len(widths) + 1
    x = adaptive_mean_pool(x, _POOLED)
    x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # Channel-major, as in published weights.
    dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.01))
    for name in ('classifier_0', 'classifier_3'):
      x = nn.relu(dense(self.hidden, dtype=self.dtype, name=name)(x))
    x = layers.at_least_float32(x)
    self.sow('intermediates', 'features', x)
    return dense(self.num_classes, name='classifier_6')(x)


def _apply_group(conv_norm, widths, first, x):
  """Applies convolutions `features_<first>`, batch norms and ReLUs, counted alike, to maps."""
  for index, width in enumerate(widths):
    number = first + 3 * index
    x = nn.relu(conv_norm(x, width, 3, names=(f'features_{number}', f'features_{number + 1}')))
  return x
