"""Building blocks of networks that predict a class per pixel."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.cpu_convolution import transposed_conv
from dfkd_jax.types import Array


class PReLU(nn.Module):
  """max(x, 0) + weight * min(x, 0), with one weight a channel, as in PyTorch."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    weight = self.param('weight', nn.initializers.constant(0.25), (x.shape[-1],))
    return jnp.where(x >= 0, x, weight.astype(x.dtype) * x)


class TransposedConv(nn.Module):
  """PyTorch's transposed convolution of stride 2 without bias; doubles height and width.

  The kernel is [size, size, features, C], so that PyTorch's [C, features, size, size] has the
  layout of other kernels.
  """

  features: int
  size: int = 2  # Or 4, with a padding of 1.
  kernel_init: nn.initializers.Initializer = layers.uniform_fan_in
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = self.size, self.size, self.features, x.shape[-1]
    kernel = self.param('kernel', self.kernel_init, shape)
    dtype = nn.dtypes.canonicalize_dtype(x, kernel, dtype=self.dtype)
    return transposed_conv(x.astype(dtype), kernel.astype(dtype))


def sow_features(module: nn.Module, x: Array) -> None:
  """Sows maps [B, h, w, D], averaged over their pixels, as the `features` [B, D] of a module."""
  module.sow('intermediates', 'features', layers.at_least_float32(x).mean((1, 2)))


def average_pool(x: Array) -> Array:
  """Averages 3x3 pixels at every second one. Counts zeros beyond the border, as PyTorch does."""
  height, width = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  x = sum(x[:, i:i + 2 * height - 1:2] for i in range(3))
  return sum(x[:, :, i:i + 2 * width - 1:2] for i in range(3)) / 9


def pad_to_multiple(x: Array, multiple: int) -> Array:
  """Repeats the last row and column until height and width are multiples."""
  pads = [(0, -size % multiple) for size in x.shape[1:3]]
  return jnp.pad(x, ((0, 0), *pads, (0, 0)), mode='edge') if any(map(max, pads)) else x


def enlarge(x: Array, size: tuple[int, int]) -> Array:
  """Interpolates maps [B, h, w, C] to (H, W), bilinearly between centres of pixels."""
  x = layers.at_least_float32(x)
  return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), 'linear', antialias=False)
