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
  """Means over `size` x `size` ranges of pixels that cover the maps as evenly as whole pixels allow.

  The i-th range of n pixels goes from floor(i n / size) up to ceil((i + 1) n / size), PyTorch's rule: where
  n is no multiple of `size` they overlap, and where n is smaller pixels are repeated.

  Args:
    x: [B, H, W, C].
    size: Of what comes out, on both axes.

  Returns:
    [B, size, size, C].
  """
  for axis in (1, 2):
    if x.shape[axis] != size:
      means = jnp.asarray(_ranges(x.shape[axis], size), x.dtype)
      x = jnp.moveaxis(jnp.tensordot(x, means, ((axis,), (1,)), precision=lax.Precision.HIGHEST), -1, axis)
  return x


def _ranges(pixels: int, size: int) -> np.ndarray:
  """[size, pixels]: rows that take means."""
  matrix = np.zeros((size, pixels))
  for i in range(size):
    start, stop = i * pixels // size, math.ceil((i + 1) * pixels / size)
    matrix[i, start:stop] = 1 / (stop - start)
  return matrix


class ImageNetVGG(nn.Module):
  """VGG-11, -13, -16, -19 as torchvision defines them, whose names these are, but without dropout.

  Attributes:
    num_classes: Of the logits.
    groups: Widths of the convolutions of each group; a 2x2 max-pooling follows each.
    hidden: Width of the two dense layers before the last; its second one are the features.
    epsilon: Of the batch norms.
    remat: Keep only the input of each group for the backward pass.
    dtype: Of the computation; None for that of parameters and inputs.
  """

  num_classes: int
  groups: tuple[tuple[int, ...], ...] = ((64,), (128,), (256, 256), (512, 512), (512, 512))
  hidden: int = 4096
  epsilon: float = 1e-5
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalised images [B, H, W, C] to logits [B, num_classes], at least float32."""
    index = 0
    for i, widths in enumerate(self.groups):
      run = functools.partial(_group, widths, index, train, self.epsilon, self.dtype)
      x = layers.remat_if(self, run, x, self.remat)
      self.sow('intermediates', f'stage_{i + 1}', x)
      x = nn.max_pool(x, (2, 2), (2, 2))
      index += 3 * len(widths) + 1
    x = adaptive_mean_pool(x, _POOLED)
    x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # Channel-major, so that published weights fit.
    dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.01))
    for name in ('classifier_0', 'classifier_3'):
      x = nn.relu(dense(self.hidden, dtype=self.dtype, name=name)(x))
    x = layers.at_least_float32(x)
    self.sow('intermediates', 'features', x)
    return dense(self.num_classes, name='classifier_6')(x)


def _group(widths, index, train, epsilon, dtype, x):
  """Convolutions, batch norms and ReLUs, called `features_<index>` and on, the ReLUs counted too."""
  for i, width in enumerate(widths):
    x = layers.Conv(
        width, (3, 3), padding=1, kernel_init=layers.he_fan_out, dtype=dtype, name=f'features_{index + 3 * i}')(x)
    x = layers.BatchNorm(
        use_running_average=not train, epsilon=epsilon, dtype=dtype, name=f'features_{index + 3 * i + 1}')(x)
    x = nn.relu(x)
  return x
