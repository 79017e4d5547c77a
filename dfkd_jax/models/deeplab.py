"""DeepLabv3 (Chen et al., arXiv:1706.05587) over ResNet-50 and MobileNetV2: a class per pixel.

At an output stride of 8: later strides are replaced by dilations. Modules have torchvision's names.
The published dropout before the last layers is left out, as are auxiliary heads.
"""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax.messages import check_choice
from dfkd_jax.models import dense_layers, layers, mobilenet
from dfkd_jax.models.resnet import Block
from dfkd_jax.types import Array

_HEAD = 256  # Channels.
# Channels, blocks, strides, and dilations of the first block and of the others.
_RESNET50 = (
    (256, 3, 1, (1, 1)), (512, 4, 2, (1, 1)), (1024, 6, 1, (1, 2)), (2048, 3, 1, (2, 4)))
# Dilations of each stage of MobileNetV2, in the code of FastDFKD and of DFAD.
_DILATIONS = {
    'fast': ((1, 1), (1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4)),
    'dfad': ((1, 1), (1, 1), (1, 1), (1, 1), (2, 2), (2, 2), (4, 4))}
_AT_STRIDE_8 = 3  # MobileNetV2's stages from here on have no strides.


class DeepLabV3(nn.Module):
  """DeepLabv3 over ResNet-50, with the dilations of torchvision: stages 3 and 4 keep the size."""

  num_classes: int
  rates: tuple[int, int, int] = (12, 24, 36)  # Of the head; DFAD's third one is 32.
  epsilon: float = 1e-5
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, H, W, num_classes], at least float32."""
    size = x.shape[1:3]
    x = nn.relu(layers.conv_norm(
        self, x, 64, 7, 2, train=train, names=('backbone_conv1', 'backbone_bn1')))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    stages = [
        [functools.partial(
            Block, width, strides if i == 0 else 1, bottleneck=True, rate=rates[i > 0],
            projection_name='downsample', kernel_init=layers.he_fan_out, epsilon=self.epsilon,
            dtype=self.dtype, name=f'backbone_layer{stage}_{i}') for i in range(blocks)]
        for stage, (width, blocks, strides, rates) in enumerate(_RESNET50, 1)]
    x = layers.apply_stages(self, stages, x, train)
    return _predict(self, x, size, train)


class DeepLabV3MobileNet(nn.Module):
  """DeepLabv3 over MobileNetV2, which ends at its 320 channels.

  Blocks pad their input, not the expanded maps, as in the code of FastDFKD and DFAD.
  """

  num_classes: int
  rates: tuple[int, int, int] = (12, 24, 36)  # Of the head; DFAD's third one is 32.
  plan: str = 'fast'  # Code base of the dilations, 'fast' or 'dfad'.
  stem_padding: int = 0  # 1 in DFAD's code.
  epsilon: float = 1e-5
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Normalized images [B, H, W, C] to logits [B, H, W, num_classes], at least float32."""
    size = x.shape[1:3]
    check_choice(self.plan, _DILATIONS, 'plan')
    x = nn.relu6(layers.conv_norm(
        self, x, 32, 3, 2, train=train, padding=self.stem_padding,
        names=('backbone_features_0_0', 'backbone_features_0_1')))
    names = (f'backbone_features_{index}' for index in itertools.count(1))
    stages = [
        [functools.partial(
            mobilenet.InvertedResidual, channels,
            strides if i == 0 and stage < _AT_STRIDE_8 else 1, expansion, rate=rates[i > 0],
            padding='input', epsilon=self.epsilon, dtype=self.dtype, name=next(names))
         for i in range(blocks)]
        for stage, ((expansion, channels, blocks, strides), rates) in enumerate(
            zip(mobilenet.STAGES, _DILATIONS[self.plan], strict=True))]
    x = layers.apply_stages(self, stages, x, train)
    return _predict(self, x, size, train)


def _predict(module: nn.Module, x: Array, size: tuple[int, int], train: bool) -> Array:
  """Applies the atrous spatial pyramid and the classifier; returns logits of the images' size."""
  dense_layers.sow_features(module, x)
  conv_norm = functools.partial(
      layers.conv_norm, module, train=train, kernel_init=nn.initializers.he_normal())
  pyramid = lambda branch: (f'classifier_0_convs_{branch}_0', f'classifier_0_convs_{branch}_1')
  branches = [conv_norm(x, _HEAD, 1, names=pyramid(0))]
  branches += [conv_norm(x, _HEAD, 3, rate=rate, names=pyramid(branch))
               for branch, rate in enumerate(module.rates, 1)]
  pooled = x.mean((1, 2), keepdims=True)
  names = 'classifier_0_convs_4_1', 'classifier_0_convs_4_2'
  branches.append(jnp.broadcast_to(conv_norm(pooled, _HEAD, 1, names=names), branches[0].shape))
  y = nn.relu(jnp.concatenate(branches, axis=-1))
  y = nn.relu(conv_norm(y, _HEAD, 1, names=('classifier_0_project_0', 'classifier_0_project_1')))
  y = nn.relu(conv_norm(y, _HEAD, 3, names=('classifier_1', 'classifier_2')))
  logits = layers.Conv(
      module.num_classes, (1, 1), kernel_init=nn.initializers.he_normal(), dtype=module.dtype,
      name='classifier_4')(y)
  return dense_layers.enlarge(logits, size)
