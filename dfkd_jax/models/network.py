"""A Linen module bound to its variables: a teacher or a student."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from dfkd_jax.models import layers
from dfkd_jax.types import Array, Moments, Outputs, PyTree

_static = functools.partial(struct.field, pytree_node=False)


class Network(struct.PyTreeNode, eq=False):  # Equal if identical, so `jax.jit(network)` can hash.
  """A module, its variables and its preprocessing: maps images in [0, 1] to `Outputs`.

  The preprocessing of published weights is given in units of [0, 1]. For example, (x - 127) / 128
  of bytes is a mean of 127 / 255 and a std of 128 / 255. Keras' "caffe" mode, BGR minus
  (103.939, 116.779, 123.68), is `bgr` with that mean over 255 in RGB order, and a std of 1 / 255.

  Any Linen module works that maps images [B, H, W, C] to logits [B, ..., K], has only `params`
  and `batch_stats`, and draws no random numbers in training. A flag `train`, `training` or
  `is_training` of its call is set, as is the opposite flag `use_running_average` or
  `deterministic`. `layers.capture_moments` captures its batch norms. `Outputs` also contains
  `features` and `stage_<i>`, if the module sows them into its intermediates.
  """

  params: PyTree
  batch_stats: PyTree
  module: nn.Module = _static()
  mean: tuple[float, ...] = _static(default=(0.0,))  # Of images; one for all channels, or one each.
  std: tuple[float, ...] = _static(default=(1.0,))  # Divides images minus the mean, likewise.
  bgr: bool = _static(default=False)  # Whether the module expects channels in reverse order.
  # (H, W) that it expects; None: any size. A class per pixel then comes back to the images' size.
  resize: tuple[int, int] | None = _static(default=None)
  logits: int | str | None = _static(default=None)  # Index or key, if it returns a tuple or a dict.

  def __call__(self, images: Array) -> Outputs:
    """Evaluates images [B, H, W, C] in [0, 1]; batch norms use their running moments."""
    return self.forward(images)[0]

  def forward(self, images: Array, *, train: bool = False,
              axis: str | None = None) -> tuple[Outputs, PyTree]:
    """Returns the outputs for images [B, H, W, C] in [0, 1], and the running moments.

    With `train`, batch norms normalize by the moments of this batch, which is spread over the
    devices of the mapped `axis`, if any, and update the running ones.
    """
    mutable = ['intermediates', 'batch_stats'] if train else ['intermediates']
    with layers.capture_moments(axis):
      results, new = self.module.apply(
          {'params': self.params, 'batch_stats': self.batch_stats}, self.preprocess(images),
          mutable=mutable, **_mode(self.module, train))
    if isinstance(results, (tuple, list, Mapping)):
      entries = list(results if isinstance(results, Mapping) else range(len(results)))
      if self.logits not in entries:
        raise ValueError(
            f'The module returns a {type(results).__name__} with entries {entries}: the option '
            f'logits of models.bind must be one of these, not {self.logits!r}.')
      results = results[self.logits]
    if results.ndim == 4:
      results = _fit(results, images.shape[1:3])
    sown = new.get('intermediates', {})
    captures = layers.captures_by_path(sown)
    stages = [f'stage_{i}' for i in range(1, len(sown) + 1)]
    outputs = Outputs(logits=results, features=sown['features'][0] if 'features' in sown else None,
                      maps=tuple(sown[stage][0] for stage in stages if stage in sown),
                      moments={path: capture.moments for path, capture in captures.items()},
                      pooled={path: capture.pooled for path, capture in captures.items()})
    return outputs, new.get('batch_stats', self.batch_stats)

  def preprocess(self, images: Array) -> Array:
    """Resizes and normalizes images [B, H, W, C] in [0, 1], and puts their channels in order."""
    if self.resize is not None and images.shape[1:3] != self.resize:
      # Bilinear. Shrinking averages over the pixels that each new pixel covers.
      shape = (images.shape[0], *self.resize, images.shape[3])
      images = jax.image.resize(images, shape, 'linear', antialias=True)
    mean, std = (jnp.asarray(values, images.dtype) for values in (self.mean, self.std))
    images = (images - mean) / std
    return images[..., ::-1] if self.bgr else images

  def running(self) -> dict[str, Moments]:
    """Running moments by path of the batch norm, as in `Outputs.moments`."""
    return layers.running_by_path(self.batch_stats)

  def check_moments(self, captured: dict[str, Moments]) -> None:
    """Checks that running moments and `Outputs.moments` (shapes suffice) are of the same layers."""
    running = self.running()
    for path in running | captured:
      if path not in running:
        raise ValueError(
            f'The batch norm of {path!r} is called more than once, on inputs that share its '
            'running moments: each call needs an nn.BatchNorm of its own.')
      if path not in captured or captured[path].mean.shape != running[path].mean.shape:
        raise ValueError(
            f'Cannot capture the input of normalization {path!r}: within nn.scan or nn.vmap it '
            "needs variable_axes={'params': 0, 'batch_stats': 0, 'intermediates': 0}; otherwise it "
            'must be an nn.BatchNorm.')

  def num_params(self) -> int:
    """Number of trainable values."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def create(module: nn.Module, key: jax.Array, image_shape: tuple[int, int, int],
           **preprocessing: Any) -> Network:
  """Makes a network with fresh variables for images [H, W, C]; see `bind` for `preprocessing`."""
  shape = (*(preprocessing.get('resize') or image_shape[:2]), image_shape[2])
  init = jax.jit(lambda key: module.init(key, jnp.zeros((1, *shape)), **_mode(module, False)))
  return bind(module, init(key), **preprocessing)


def bind(module: nn.Module, variables: Mapping[str, Any], *, mean: tuple[float, ...] = (0.0,),
         std: tuple[float, ...] = (1.0,), bgr: bool = False, resize: tuple[int, int] | None = None,
         logits: int | str | None = None) -> Network:
  """Makes a network from a module and its fresh or trained variables.

  `variables` are {'params': ..., 'batch_stats': ...}; the latter may be missing. See `Network`.
  """
  if others := sorted(set(variables) - {'params', 'batch_stats', 'intermediates'}):
    raise ValueError(
        f'variables has the collections {others}; a module may have params and batch_stats only.')
  return Network(params=variables['params'], batch_stats=variables.get('batch_stats', {}),
                 module=module, mean=tuple(mean), std=tuple(std), bgr=bgr,
                 resize=None if resize is None else tuple(resize), logits=logits)


def _fit(logits: Array, size: tuple[int, int]) -> Array:
  """Brings logits [B, h, w, K] to (H, W): by means of whole blocks, or bilinearly."""
  if logits.shape[1:3] == tuple(size):
    return logits
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  (batch, height, width, classes), (rows, columns) = logits.shape, size
  if height % rows == width % columns == 0:
    blocks = logits.reshape(batch, rows, height // rows, columns, width // columns, classes)
    return blocks.mean((2, 4))
  return jax.image.resize(logits, (batch, rows, columns, classes), 'linear', antialias=True)


def _mode(module: nn.Module, train: bool) -> dict[str, bool]:
  """The flag by which this module is told to train, if it has one."""
  parameters = inspect.signature(type(module).__call__).parameters
  for name in ('train', 'training', 'is_training'):
    if name in parameters:
      return {name: train}
  opposite = ('use_running_average', 'deterministic')
  return {name: not train for name in opposite if name in parameters}
