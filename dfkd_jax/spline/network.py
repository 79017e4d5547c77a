"""ReLU networks that compute the same function as a sum of hinges, and changes that keep it.

A hinge is one unit: its weight is the slope, its bias minus slope times knot. So a layer of hinges
and a linear read-out equal the spline everywhere, also beyond the data. Rounding is all that
differs. With slopes of 1 and -1, as of terms of one hinge, a unit rounds its knot and one
difference. A linear part, directions and terms of two hinges round their sums and products, too.

Three limits of this equality:

  * Accelerators multiply matrices in fewer digits, unless `precision` is
    `jax.lax.Precision.HIGHEST`.
  * An infinite feature gives NaN in all units, since 0 times infinity is NaN.
  * Parameters in bfloat16 round the knots.

References:
  Mo et al., 2021, https://arxiv.org/abs/2102.06554. Its text was not at hand; we take its word
  reshaping to mean `widen` and `deepen`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dfkd_jax.spline.model import HingeModel
from dfkd_jax.types import Array, PRNGKey, PyTree

Params = dict[str, dict[str, Any]]  # 'Dense_0', 'Dense_1', ...: kernel [in, out] and bias [out].


class ReluNetwork(nn.Module):
  """Dense layers with ReLU between them: x [..., d] to [..., num_outputs]."""

  widths: tuple[int, ...]  # Of the hidden layers.
  num_outputs: int
  precision: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps features [..., d] to responses [..., num_outputs]."""
    for i, width in enumerate((*self.widths, self.num_outputs)):
      x = nn.relu(x) if i else x
      # A spline without terms has a layer of no units, for which JAX 0.10 draws no weights.
      has_units = x.shape[-1] and width
      init = nn.initializers.lecun_normal() if has_units else nn.initializers.zeros
      x = nn.Dense(width, precision=self.precision, kernel_init=init, name=f'Dense_{i}')(x)
    return x


def network_of(params: Params, precision: Any = None) -> ReluNetwork:
  """Makes the module of parameters."""
  widths = [params[f'Dense_{i}']['bias'].shape[0] for i in range(len(params))]
  return ReluNetwork(tuple(widths[:-1]), widths[-1], precision)


def relu_network(model: HingeModel, num_features: int) -> Params:
  """Returns parameters of the network that equals a spline of `num_features` features, float64.

  Terms of one hinge take one hidden layer, the smaller of two hinges takes two. The linear part
  takes 2 units for each response: l = max(0, l) - max(0, -l).
  """
  slope, coefficient = model.slope, model.coefficient
  is_real = slope != 0
  hinges = is_real.sum()
  weights = np.zeros((num_features if model.projection is None else model.projection.shape[1],
                      hinges))
  weights[model.feature[is_real], np.arange(hinges)] = slope[is_real]
  if model.projection is not None:
    weights = model.projection @ weights
  first = {'kernel': weights, 'bias': -slope[is_real] * model.knot[is_real]}
  unit = np.full(slope.shape, -1)
  unit[is_real] = np.arange(hinges)
  layers = [first]
  if slope.shape[1] == 2:
    # min(a, b) = a - max(0, a - b), since a is not negative.
    pairs = np.flatnonzero(is_real[:, 1])
    second = np.zeros((hinges, len(coefficient) + len(pairs)))
    second[unit[:, 0], np.arange(len(coefficient))] = 1
    extra = len(coefficient) + np.arange(len(pairs))
    second[unit[pairs, 0], extra], second[unit[pairs, 1], extra] = 1, -1
    layers.append({'kernel': second, 'bias': np.zeros(second.shape[1])})
    coefficient = np.concatenate([coefficient, -coefficient[pairs]])
  layers.append({'kernel': coefficient.copy(), 'bias': model.intercept.copy()})
  if model.linear is not None:
    layers = _with_linear_units(layers, model.linear)
  return {f'Dense_{i}': layer for i, layer in enumerate(layers)}


def _with_linear_units(layers, linear):
  """Adds units for a linear map [d, C] to each hidden layer, and its sum to the read-out."""
  count, (first, *hidden, last) = linear.shape[1], layers
  eye, none = np.eye(2 * count), np.zeros(2 * count)
  first = {'kernel': np.concatenate([first['kernel'], linear, -linear], 1),
           'bias': np.concatenate([first['bias'], none])}
  hidden = [{'kernel': _block_diagonal(layer['kernel'], eye),
             'bias': np.concatenate([layer['bias'], none])} for layer in hidden]
  signs = np.concatenate([np.eye(count), -np.eye(count)])
  last = {'kernel': np.concatenate([last['kernel'], signs]), 'bias': last['bias']}
  return [first, *hidden, last]


def _block_diagonal(a, b):
  return np.block([[a, np.zeros((a.shape[0], b.shape[1]))],
                   [np.zeros((b.shape[0], a.shape[1])), b]])


def widen(params: Params, width: int, key: PRNGKey, layer: int = -1) -> Params:
  """Adds units to a hidden layer, without effect on the function until they are trained.

  New units have random weights in and zero weights out, so that the read-out has a gradient at
  once, and the new units after its first step. Raises a ValueError if the layer is wider.

  Args:
    width: Units of the hidden layer afterwards.
    key: For the weights, of He et al. (arXiv:1502.01852).
    layer: Number of the hidden layer, from the end if negative.
  """
  names = [f'Dense_{i}' for i in range(len(params))]
  layer = range(len(names) - 1)[layer]
  before, after = params[names[layer]], params[names[layer + 1]]
  inputs, units = before['kernel'].shape
  if width < units:
    raise ValueError(f'width is {width}, must be at least {units}, the units of the layer: keep '
                     'fewer terms.')
  fresh = np.asarray(jax.random.normal(key, (inputs, width - units)), before['kernel'].dtype)
  none = np.zeros((width - units, after['kernel'].shape[1]), after['kernel'].dtype)
  return params | {
      names[layer]: {
          'kernel': np.concatenate([before['kernel'], fresh * math.sqrt(2 / inputs)], 1),
          'bias': np.concatenate([before['bias'], np.zeros(width - units, before['bias'].dtype)])},
      names[layer + 1]: after | {'kernel': np.concatenate([after['kernel'], none])}}


def deepen(params: Params, count: int = 1) -> Params:
  """Adds hidden layers before the last one that pass their inputs on: these are not negative."""
  *hidden, last = [params[f'Dense_{i}'] for i in range(len(params))]
  units = last['kernel'].shape[0]
  dtype = last['kernel'].dtype
  same = [{'kernel': np.eye(units, dtype=dtype), 'bias': np.zeros(units, dtype)}
          for _ in range(count)]
  return {f'Dense_{i}': layer for i, layer in enumerate([*hidden, *same, last])}


def rescale(params: Params) -> Params:
  """Balances the weights before and after each unit of the last hidden layer, by powers of two.

  The function stays the same to the bit, and gradients of both layers become of similar size.
  """
  before, after = (params[f'Dense_{len(params) - i}'] for i in (2, 1))
  size_in = np.sqrt(np.square(before['kernel']).sum(0) + np.square(before['bias']))
  size_out = np.sqrt(np.square(after['kernel']).sum(1))
  has_both = (size_in > 0) & (size_out > 0)
  ratio = np.where(has_both, size_out, 1) / np.where(has_both, size_in, 1)
  factor = np.exp2(np.round(np.log2(ratio) / 2)).astype(before['kernel'].dtype)
  return params | {
      f'Dense_{len(params) - 2}': {
          'kernel': before['kernel'] * factor, 'bias': before['bias'] * factor},
      f'Dense_{len(params) - 1}': after | {'kernel': after['kernel'] / factor[:, None]}}


def hinge_mask(params: Params) -> Params:
  """Tells which weights of a spline's network are in use: of all layers but the last, those not 0.

  Where only these learn, see `mask_updates`, each unit stays a hinge of its feature, with a knot
  and slopes that are learnt.
  """
  masks = jax.tree.map(lambda values: np.ones(values.shape, bool), params)
  for i in range(len(params) - 1):
    masks[f'Dense_{i}']['kernel'] = params[f'Dense_{i}']['kernel'] != 0
  return masks


def mask_updates(mask: PyTree) -> optax.GradientTransformation:
  """Last transformation of a chain: weights where the mask is False or 0 stay the same."""
  return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, mask))
