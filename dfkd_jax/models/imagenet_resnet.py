"""Residual networks for ImageNet (He et al., arXiv:1512.03385): 7x7 stem and max-pooling."""

import functools
from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.resnet import STRIDE_IN, Block
from dfkd_jax.types import Array


class ImageNetResNet(nn.Module):
  """ResNet-18, -34, -50 as torchvision defines them, whose names these are.

  Keras' ResNet-50 is that of the paper: strides in the first 1x1 convolution of a
  bottleneck, biases in all convolutions, epsilon 1.001e-5.

  Attributes:
    num_classes: Of the logits.
    stage_sizes: Blocks of each stage; each stage but the first halves the maps.
    bottleneck: Blocks of three convolutions, four times as wide.
    width: Of the stem, and of the first stage's inner convolutions.
    stride_in: Which convolution of a bottleneck has the strides, '3x3' or '1x1'.
    conv_bias: Whether convolutions have biases.
    epsilon: Of the batch norms.
    remat: Keep only the input of each block for the backward pass.
    dtype: Of the computation; None for that of parameters and inputs.

  Raises:
    ValueError: If `stride_in` is neither.
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
    """Normalised images [B, H, W, C] to logits [B, num_classes], at least float32."""
    x = layers.Conv(
        self.width, (7, 7), 2, padding=3, use_bias=self.conv_bias, kernel_init=layers.he_fan_out,
        dtype=self.dtype, name='conv1')(x)
    x = layers.BatchNorm(
        use_running_average=not train, epsilon=self.epsilon, dtype=self.dtype, name='bn1')(x)
    x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), ((1, 1), (1, 1)))
    block = functools.partial(
        Block, bottleneck=self.bottleneck, projection_name='downsample', kernel_init=layers.he_fan_out,
        stride_in=self.stride_in, use_bias=self.conv_bias, epsilon=self.epsilon, dtype=self.dtype)
    for i, size in enumerate(self.stage_sizes):
      width = self.width * 2**i * (4 if self.bottleneck else 1)
      for j in range(size):
        run = functools.partial(_run, block, width, 2 if i and not j else 1, f'layer{i + 1}_{j}', train)
        x = layers.remat_if(self, run, x, self.remat)
      self.sow('intermediates', f'stage_{i + 1}', x)
    x = layers.pool_features(self, x)
    return layers.dense(self.num_classes, x.shape[-1], name='fc')(x)


def _run(block, width, strides, name, train, x):
  return block(width, strides, name=name)(x, train)
