"""Networks by name, and generators.

A classifier maps normalized images [B, H, W, C] to logits [B, num_classes], at least float32. A
block maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), width]. These attributes mean
the same in all of them:

  num_classes: Number of logits.
  head: Name of the last dense layer, whose inputs are `features`.
  head_width: Units of a hidden layer `<head>_hidden` before it. None: there is no such layer.
  dtype: Dtype of the computation. None uses the dtype of parameters and inputs.
  epsilon, momentum: Of the batch norms.
  remat: Whether the backward pass keeps only the input of each block, and recomputes the rest.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from dfkd_jax.messages import check_choice
from dfkd_jax.models.deeplab import DeepLabV3, DeepLabV3MobileNet
from dfkd_jax.models.drn import DilatedResNet
from dfkd_jax.models.espnet import ESPEncoder, ESPNet
from dfkd_jax.models.generator import DFADGenerator, Generator, SpatialGenerator
from dfkd_jax.models.mobilenet import EfficientNetLite, MobileNetV2
from dfkd_jax.models.network import Network, bind
from dfkd_jax.models.network import create as create_network
from dfkd_jax.models.resnet import ImageNetResNet, ResNet, ThinResNet, WideResNet
from dfkd_jax.models.shapes_generator import ShapesGenerator
from dfkd_jax.models.vgg import VGG, ConvNet, ImageNetVGG

_DEEP = (3, 4, 6, 3)  # Stage sizes of ResNet-34 and -50.


def _vgg(model: type[nn.Module], *repeats: int) -> Callable[..., nn.Module]:
  """Makes VGGs with so many convolutions in each group."""
  widths = (64, 128, 256, 512, 512)
  groups = tuple((width,) * times for width, times in zip(widths, repeats, strict=True))
  return functools.partial(model, groups=groups)


_MODELS: dict[str, Callable[..., nn.Module]] = {
    'convnet': ConvNet, 'mobilenetv2_imagenet': MobileNetV2, 'efficientnet_lite0': EfficientNetLite,
    'efficientnet_lite1': functools.partial(EfficientNetLite, depth=1.1),
    'efficientnet_lite2': functools.partial(EfficientNetLite, width=1.1, depth=1.2),
    'deeplabv3_resnet50': DeepLabV3, 'deeplabv3_mobilenet': DeepLabV3MobileNet,
    'drn': DilatedResNet, 'espnet': ESPNet, 'espnet_c': ESPEncoder,
    'resnet18_imagenet': ImageNetResNet,
    'resnet34_imagenet': functools.partial(ImageNetResNet, stage_sizes=_DEEP),
    'resnet50_imagenet': functools.partial(ImageNetResNet, stage_sizes=_DEEP, bottleneck=True),
    'resnet50_keras': functools.partial(
        ImageNetResNet, stage_sizes=_DEEP, bottleneck=True, stride_in='1x1', conv_bias=True,
        epsilon=1.001e-5),
    'resnet18': ResNet, 'resnet34': functools.partial(ResNet, stage_sizes=_DEEP),
    'resnet50': functools.partial(ResNet, stage_sizes=_DEEP, bottleneck=True),
    **{f'resnet{depth}': functools.partial(ThinResNet, depth=depth)
       for depth in (8, 20, 32, 56, 110)},
    **{f'resnet{depth}x4': functools.partial(ThinResNet, depth=depth, widths=(32, 64, 128, 256))
       for depth in (8, 32)},
    'vgg8': _vgg(VGG, 1, 1, 1, 1, 1), 'vgg11': VGG, 'vgg13': _vgg(VGG, 2, 2, 2, 2, 2),
    'vgg11_bn': ImageNetVGG, 'vgg13_bn': _vgg(ImageNetVGG, 2, 2, 2, 2, 2),
    'vgg16_bn': _vgg(ImageNetVGG, 2, 2, 3, 3, 3), 'vgg19_bn': _vgg(ImageNetVGG, 2, 2, 4, 4, 4),
    **{f'wrn{depth}_{widen}': functools.partial(WideResNet, depth=depth, widen=widen)
       for depth in (16, 40) for widen in (1, 2)}}

GENERATORS: dict[str, Callable[..., nn.Module]] = {
    'generator': Generator, 'spatial_generator': SpatialGenerator,
    'dfad_generator': DFADGenerator, 'shapes_generator': ShapesGenerator}


def names() -> tuple[str, ...]:
  """Names that `create` takes, in alphabetical order, apart from `wrn<depth>_<widen>`."""
  return tuple(sorted(_MODELS))


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
  """Makes the classifier called `name`, one of `names()` or `wrn<depth>_<widen>`; no variables.

  `options` are further attributes of the module, such as `dtype=jnp.bfloat16`, or `shortcut='pad'`
  of the thin ResNets. A ValueError says that there is no such model, or none of that depth.
  """
  if match := re.fullmatch(r'wrn(\d+)_(\d+)', name):
    return WideResNet(num_classes, *map(int, match.groups()), **options)
  check_choice(name, (*names(), 'wrn<depth>_<widen>'), 'model')
  return _MODELS[name](num_classes=num_classes, **options)
