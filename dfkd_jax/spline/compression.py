"""Compression of the dense layers of a classifier into one hidden layer, in closed form.

VGG, AlexNet and LeNet have several dense layers after their convolutions. One hidden layer that is
fitted to the logits can take their place. The convolutions stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from dfkd_jax.models import layers
from dfkd_jax.models.network import Network
from dfkd_jax.spline.head_init import fit_head
from dfkd_jax.types import PRNGKey


def compress(network: Network, module: nn.Module, images: np.ndarray, kind: str, key: PRNGKey, *,
             batch_size: int = 256) -> Network:
  """Replaces the dense layers of a network by a head in closed form, see `head_init.fit_head`.

  Args:
    network: With several dense layers at the end.
    module: The same without these layers; its layers have the names that they have in `network`.
      Its `head` and `head_width` name the new ones, as of all classifiers of `dfkd_jax.models`.
      Such as `network.module.clone(hidden=None, head_width=64)` of an `ImageNetVGG`.
    images: [N, H, W, C] in [0, 1], or uint8, to fit the head to: more than it has terms.
    kind: 'ridge', 'random_features' or 'spline'.
    key: For random units.
    batch_size: Images that the networks evaluate at once.

  Returns:
    A network of `module`, with the preprocessing of `network`.

  Raises:
    ValueError: The module names no head, has layers that `network` has not, or cannot be fitted.
  """
  names, width = layers.head_layers(module), getattr(module, 'head_width', None)
  if not names:
    raise ValueError(f'{type(module).__name__} names no dense layer as its head.')
  small = _without_stack(network, module, images.shape[1:], names)
  features, logits = [], []
  measure = jax.jit(lambda small, network, images: (small(images).features, network(images).logits))
  for first in range(0, len(images), batch_size):
    batch = images[first:first + batch_size]
    batch = batch.astype(np.float32) / (255 if batch.dtype == np.uint8 else 1)
    for results, values in zip((features, logits), measure(small, network, batch), strict=True):
      results.append(np.asarray(values))
  head = fit_head(kind, np.concatenate(features), np.concatenate(logits), width, key)
  fitted = {name: head.params[f'Dense_{i}'] for i, name in enumerate(names)}
  return small.replace(params={**small.params, **fitted})


def _without_stack(network: Network, module: nn.Module, shape: tuple[int, ...],
                   names: tuple[str, ...]) -> Network:
  """Binds the module to the layers of the network, and to zeros in its head `names`."""
  shape = (*(network.resize or shape[:2]), shape[2])
  params = dict(jax.eval_shape(
      module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), np.float32))['params'])
  for name, layer in params.items():
    if name in names:
      params[name] = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), layer)
    elif _shapes(layer) != _shapes(network.params.get(name, {})):
      raise ValueError(f'The network has no layer {name!r} of the shape that it has in the module.')
    else:
      params[name] = network.params[name]
  return network.replace(params=params, module=module)


def _shapes(layer: Mapping[str, Any]) -> Any:
  return jax.tree.map(np.shape, layer, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
