"""Residual networks for ImageNet (He et al., arXiv:1512.03385): 7x7 stem and max-pooling."""

import functools
from typing import Any

from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.resnet import STRIDE_IN, Block
from dfkd_jax.types import Array


class ImageNetResNet(nn.Module):
  """ResNet-18, -34, -50 under torchvision's names.

  Keras' ResNet-50 follows the paper: strides in the first 1x1 convolution of a bottleneck, biases
  in all convolutions, epsilon 1.001e-5.

  Attributes:
    num_classes: Number of logits.
    stage_sizes: Blocks of each stage; each stage but the first halves the maps.
    bottleneck: Whether blocks have three convolutions, and four times the width.
    width: Channels of the stem, and of the first stage's inner convolutions.
    stride_in: Convolution of a bottleneck that has the strides, '3x3' or '1x1'.
    conv_bias: Whether convolutions have biases.
    epsilon: Epsilon of the batch norms.
    remat: Whether the backward pass keeps only the input of each block.
    dtype: Dtype of the computation. None uses the dtype of parameters and inputs.

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
    conv_norm = layers.conv_norm(
        train, self.dtype, epsilon=self.epsilon, use_bias=self.conv_bias)
    x = nn.relu(conv_norm(x, self.width, 7, 2, names=('conv1', 'bn1')))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for i, size in enumerate(self.stage_sizes):
      width = self.width * 2**i * (4 if self.bottleneck else 1)
      for j in range(size):
        block = functools.partial(
            Block, width, 2 if i and not j else 1, self.bottleneck, projection_name='downsample',
            kernel_init=layers.he_fan_out, stride_in=self.stride_in, use_bias=self.conv_bias,
            epsilon=self.epsilon, dtype=self.dtype, name=f'layer{i + 1}_{j}')
        run = functools.partial(layers.apply_block, block, train)
        x = layers.remat_if(self, run, x, self.remat)
      self.sow('intermediates', f'stage_{i + 1}', x)
    x = layers.pool_features(self, x)
    return layers.dense(self.num_classes, x.shape[-1], name='fc')(x)
