"""A small dilated residual network that predicts a class per pixel.

References:
  Yu et al., Dilated Residual Networks, CVPR 2017, https://arxiv.org/abs/1705.09914: residual
  blocks whose dilations replace strides.
  Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR 2015,
  https://arxiv.org/abs/1411.4038, section 4.2: logits of a finer stage are added.
"""

from typing import Any

from flax import linen as nn

from dfkd_jax.models import dense_layers, layers
from dfkd_jax.models.resnet import Block
from dfkd_jax.types import Array

_STRIDE = 8


class DilatedResNet(nn.Module):
  """Three convolutions of stride 2, the last two followed by residual blocks; logits of two stages.

  Plain convolutions of few channels suit a CPU. By default 89,448 parameters for 12 classes.

  Attributes:
    widths: Channels of the three stages, at strides 2, 4 and 8.
    blocks: Residual blocks of the second stage.
    rates: Dilations of the residual blocks of the third stage.
  """

  num_classes: int
  widths: tuple[int, int, int] = (16, 32, 32)
  blocks: int = 1
  rates: tuple[int, ...] = (1, 2, 4)
  epsilon: float = 1e-5
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, H, W, num_classes], at least float32."""
    height, width = x.shape[1:3]
    x = dense_layers.pad_to_multiple(x, _STRIDE)
    size = x.shape[1:3]
    _, quarter, eighth = stages = self._stages(x, train)
    for stage, maps in enumerate(stages, 1):
      self.sow('intermediates', f'stage_{stage}', maps)
    dense_layers.sow_features(self, eighth)
    score = lambda name: layers.Conv(self.num_classes, (1, 1), dtype=self.dtype, name=name)
    logits = dense_layers.enlarge(score('score8')(eighth), quarter.shape[1:3])
    logits += layers.at_least_float32(score('score4')(quarter))
    return dense_layers.enlarge(logits, size)[:, :height, :width]

  def _stages(self, x: Array, train: bool) -> list[Array]:
    """Returns the maps after each stage."""
    maps, all_rates = [], ((), (1,) * self.blocks, self.rates)
    for stage, (width, rates) in enumerate(zip(self.widths, all_rates, strict=True), 1):
      x = nn.relu(layers.conv_norm(
          self, x, width, 3, 2, train=train, names=(f'conv{stage}', f'bn{stage}')))
      for i, rate in enumerate(rates):
        block = Block(width, rate=rate, kernel_init=layers.he_fan_out, epsilon=self.epsilon,
                      dtype=self.dtype, name=f'layer{stage}_{i}')
        x = layers.apply_block(self, lambda x, block=block: block(x, train), x)
      maps.append(x)
    return maps
