"""A Linen module bound to its variables: a teacher or a student."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct, traverse_util

from dfkd_jax.models import layers
from dfkd_jax.types import Array, Moments, Outputs, PyTree

_TRAINING = ('train', 'training', 'is_training')
_EVALUATING = ('use_running_average', 'deterministic')


class Network(struct.PyTreeNode, eq=False):  # Equal if identical, so that `jax.jit(network)` has a hash.
  """A module, its variables and its preprocessing: what turns images in [0, 1] into what it was trained on.

  Whatever numbers published weights expect, they are said in terms of [0, 1]: (x - 127) / 128 of bytes is a mean of
  127 / 255 and a std of 128 / 255; Keras' "caffe" mode, BGR minus (103.939, 116.779, 123.68), is `bgr` with that mean
  over 255, in the order of RGB, and a std of 1 / 255.

  Any Linen module that maps images [B, H, W, C] to logits [B, ..., K] will do, as long as it has no other variables
  than `params` and `batch_stats`, draws no random numbers in training, and calls each batch norm once.
  If its call takes a flag `train`, `training` or `is_training` (or, of the
  opposite sense, `use_running_average` or `deterministic`) that flag is set.
  Moments of its batch norms come by `layers.tapped`; a module that sows
  `features` and `stage_<i>` into its intermediates shows these in `Outputs` too.
  """

  params: PyTree
  batch_stats: PyTree
  module: nn.Module = struct.field(pytree_node=False)
  mean: tuple[float, ...] = struct.field(pytree_node=False, default=(0.0,))
  std: tuple[float, ...] = struct.field(pytree_node=False, default=(1.0,))
  bgr: bool = struct.field(pytree_node=False, default=False)  # The module wants channels in reverse order.
  resize: tuple[int, int] | None = struct.field(pytree_node=False, default=None)  # (H, W) that the module wants.

  def __call__(self, images: Array) -> Outputs:
    """Evaluation mode: batch norms use running moments.

    Args:
      images: [B, H, W, C] in [0, 1]; resized, normalised and put in order here.
    """
    return self.forward(images)[0]

  def forward(
      self, images: Array, *, train: bool = False, axis: str | None = None
  ) -> tuple[Outputs, PyTree]:
    """Outputs, and the running moments after this batch (moved if `train`).

    Args:
      images: [B, H, W, C] in [0, 1].
      train: Normalise by the moments of this batch, and move the running ones.
      axis: A mapped axis over which the batch is spread; None on one device.
    """
    inputs = self.preprocess(images)
    mutable = ['intermediates', 'batch_stats'] if train else ['intermediates']
    with layers.capture_moments(axis):
      logits, new = self.module.apply(
          {'params': self.params, 'batch_stats': self.batch_stats}, inputs,
          mutable=mutable, **_mode(self.module, train))
    sown = new.get('intermediates', {})
    outputs = Outputs(
        logits=logits,
        features=_sown(sown, 'features'),
        maps=tuple(_sown(sown, f'stage_{i}') for i in range(1, len(sown) + 1) if f'stage_{i}' in sown),
        moments=layers.moments_by_path(sown),
        pooled=layers.pooled_by_path(sown))
    return outputs, new.get('batch_stats', self.batch_stats)

  def preprocess(self, images: Array) -> Array:
    """What the module is given: images [B, H, W, C] in [0, 1], resized, normalised, and in its order of channels."""
    if self.resize is not None and images.shape[1:3] != self.resize:
      # Bilinear; where it shrinks, each pixel is an average over those that it stands for.
      shape = (images.shape[0], *self.resize, images.shape[3])
      images = jax.image.resize(images, shape, 'linear', antialias=True)
    images = (images - jnp.asarray(self.mean, images.dtype)) / jnp.asarray(self.std, images.dtype)
    return images[..., ::-1] if self.bgr else images

  def running(self) -> dict[str, Moments]:
    """Running moments by path of the batch norm, as in `Outputs.moments`."""
    flat = traverse_util.flatten_dict(dict(self.batch_stats), sep='/')
    paths = sorted(path.removesuffix('/mean') for path in flat if path.endswith('/mean'))
    return {path: Moments(flat[f'{path}/mean'], flat[f'{path}/var']) for path in paths}

  def num_params(self) -> int:
    """How many trainable numbers there are."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def create(
    module: nn.Module,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    **preprocessing: Any,
) -> Network:
  """A network with fresh variables for images [H, W, C]; `preprocessing` is that of `bind`."""
  shape = (*(preprocessing.get('resize') or image_shape[:2]), image_shape[2])
  variables = jax.jit(lambda k: module.init(k, jnp.zeros((1, *shape)), **_mode(module, False)))(key)
  return bind(module, variables, **preprocessing)


def bind(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    bgr: bool = False,
    resize: tuple[int, int] | None = None,
) -> Network:
  """A network from a module and the variables that its `init` gave, or training left.

  Args:
    module: Maps preprocessed images to logits.
    variables: {'params': ..., 'batch_stats': ...}; the latter may be missing.
    mean: Subtracted from images in [0, 1], one number or one a channel, in the order of the image.
    std: What they are divided by then.
    bgr: Whether the module wants the channels in reverse order.
    resize: (H, W) that the module wants of images of any size; None: it takes them as they are.
  """
  return Network(
      params=variables['params'], batch_stats=variables.get('batch_stats', {}), module=module, mean=tuple(mean),
      std=tuple(std), bgr=bgr, resize=None if resize is None else tuple(resize))


def _mode(module: nn.Module, train: bool) -> dict[str, bool]:
  """The flag by which this module is told to train, if it has one."""
  known = inspect.signature(type(module).__call__).parameters
  for name in _TRAINING:
    if name in known:
      return {name: train}
  return {name: not train for name in _EVALUATING if name in known}


def _sown(intermediates: Mapping[str, Any], name: str) -> Array | None:
  return intermediates[name][0] if name in intermediates else None
