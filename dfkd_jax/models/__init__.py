"""Networks by name, and what they are built of."""

import functools
import re
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from dfkd_jax.messages import nearest
from dfkd_jax.models.convnet import ConvNet
from dfkd_jax.models.efficientnet import EfficientNetLite
from dfkd_jax.models.generator import Generator, SpatialGenerator
from dfkd_jax.models.imagenet_resnet import ImageNetResNet
from dfkd_jax.models.imagenet_vgg import ImageNetVGG
from dfkd_jax.models.mobilenet import MobileNetV2
from dfkd_jax.models.network import Network, bind
from dfkd_jax.models.network import create as create_network
from dfkd_jax.models.resnet import ResNet
from dfkd_jax.models.thin_resnet import ThinResNet
from dfkd_jax.models.vgg import VGG
from dfkd_jax.models.wide_resnet import WideResNet

__all__ = [
    'ConvNet', 'EfficientNetLite', 'Generator', 'ImageNetResNet', 'ImageNetVGG', 'MobileNetV2', 'Network', 'ResNet',
    'SpatialGenerator', 'ThinResNet', 'VGG', 'WideResNet',
    'bind', 'create', 'create_network', 'names',
]
_WIDE_RESNET = re.compile(r'wrn(\d+)_(\d+)')
_WIDER = (32, 64, 128, 256)


def _deep(first: int, last: int) -> tuple[tuple[int, ...], ...]:
  """Groups of VGG for ImageNet: two of `first` convolutions, three of `last`."""
  return ((64,) * first, (128,) * first, (256,) * last, (512,) * last, (512,) * last)


_MODELS: dict[str, Callable[..., nn.Module]] = {
    'convnet': ConvNet,
    'efficientnet_lite0': EfficientNetLite,
    'efficientnet_lite1': functools.partial(EfficientNetLite, depth=1.1),
    'efficientnet_lite2': functools.partial(EfficientNetLite, width=1.1, depth=1.2),
    'mobilenetv2_imagenet': MobileNetV2,
    'resnet18_imagenet': functools.partial(ImageNetResNet, stage_sizes=(2, 2, 2, 2)),
    'resnet34_imagenet': functools.partial(ImageNetResNet, stage_sizes=(3, 4, 6, 3)),
    'resnet50_imagenet': functools.partial(ImageNetResNet, stage_sizes=(3, 4, 6, 3), bottleneck=True),
    'resnet50_keras': functools.partial(
        ImageNetResNet, stage_sizes=(3, 4, 6, 3), bottleneck=True, stride_in='1x1', conv_bias=True, epsilon=1.001e-5),
    'resnet18': functools.partial(ResNet, stage_sizes=(2, 2, 2, 2)),
    'resnet34': functools.partial(ResNet, stage_sizes=(3, 4, 6, 3)),
    'resnet50': functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), bottleneck=True),
    'resnet8': functools.partial(ThinResNet, depth=8),
    'resnet20': functools.partial(ThinResNet, depth=20),
    'resnet32': functools.partial(ThinResNet, depth=32),
    'resnet56': functools.partial(ThinResNet, depth=56),
    'resnet110': functools.partial(ThinResNet, depth=110),
    'resnet8x4': functools.partial(ThinResNet, depth=8, widths=_WIDER),
    'resnet32x4': functools.partial(ThinResNet, depth=32, widths=_WIDER),
    'vgg8': functools.partial(VGG, groups=((64,), (128,), (256,), (512,), (512,))),
    'vgg11': functools.partial(VGG, groups=((64,), (128,), (256, 256), (512, 512), (512, 512))),
    'vgg13': functools.partial(VGG, groups=((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))),
    'vgg11_bn': ImageNetVGG,
    'vgg13_bn': functools.partial(ImageNetVGG, groups=_deep(2, 2)),
    'vgg16_bn': functools.partial(ImageNetVGG, groups=_deep(2, 3)),
    'vgg19_bn': functools.partial(ImageNetVGG, groups=_deep(2, 4)),
    'wrn16_1': functools.partial(WideResNet, depth=16, widen=1),
    'wrn16_2': functools.partial(WideResNet, depth=16, widen=2),
    'wrn40_1': functools.partial(WideResNet, depth=40, widen=1),
    'wrn40_2': functools.partial(WideResNet, depth=40, widen=2),
}


def names() -> tuple[str, ...]:
  """Names that `create` takes, in alphabetic order; besides these, any `wrn<depth>_<widen>`."""
  return tuple(sorted(_MODELS))


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
  """A classifier by name, not yet with variables.

  Args:
    name: One of `names()`, or `wrn<depth>_<widen>`.
    num_classes: Of its logits.
    **options: Other attributes of the module, such as `dtype=jnp.bfloat16`, or
      `shortcut='pad'` of the thin ResNets.

  Raises:
    ValueError: If there is no such model, or it cannot be that deep.
  """
  if name in _MODELS:
    return _MODELS[name](num_classes=num_classes, **options)
  if match := _WIDE_RESNET.fullmatch(name):
    return WideResNet(num_classes, *map(int, match.groups()), **options)
  raise ValueError(
      f'Unknown model {name!r}.{nearest(name, names())} Known: {", ".join(names())} and wrn<depth>_<widen>.')
