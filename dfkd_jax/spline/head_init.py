"""Fully connected heads in closed form, from features and the logits that they should give.

The read-out of a head is a least-squares solution on a set of images:

  'ridge'            a linear map: one dense layer; or two units of a hidden layer for each class
  'random_features'  a hidden layer of random units; only the read-out is fitted
  'spline'           a hidden layer of a linear map and of hinges (`hinge_fit`)
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from dfkd_jax.messages import check_choice
from dfkd_jax.spline.fit import check_arrays, hinge_fit
from dfkd_jax.spline.model import HingeModel
from dfkd_jax.spline.network import Params, relu_network, rescale, widen
from dfkd_jax.types import PRNGKey

KINDS = ('ridge', 'random_features', 'spline')
_RIDGE = 1e-4  # Penalty, relative to the mean variance of the columns.


class FittedHead(NamedTuple):
  """A fitted head."""

  params: Params  # Float32. The last layer is the read-out; before it is the hidden one, if any.
  num_terms: int  # Hinges, or random units; 0 of a linear map.


def fit_head(kind: str, features: np.ndarray, logits: np.ndarray, width: int | None, key: PRNGKey,
             *, is_centred: bool = True, num_knots: int = 20) -> FittedHead:
  """Fits a head of `width` hidden units in float64.

  Units that the solution does not need have random weights in and zero weights out, see `widen`.

  Args:
    kind: One of `KINDS`.
    features: [N, D], inputs of the head.
    logits: [N, K], its targets.
    width: Units of the hidden layer. None: the head is one dense layer.
    key: For random units.
    is_centred: Whether to fit logits without their mean over the classes, which softmax ignores.
    num_knots: Most knots a feature, see `hinge_fit`.

  Raises:
    ValueError: The kind is unknown, the width does not suit it, there is only one class, there are
      too few rows, or values are not finite.
  """
  check_choice(kind, KINDS, 'head_init')
  features, logits = check_arrays(features, logits, ('features', 'logits'))
  num_rows, num_classes = logits.shape
  if num_classes < 2:
    raise ValueError(f'logits has shape {logits.shape}, must have at least 2 classes.')
  check_width(kind, width, num_classes)
  terms = max_terms(kind, width, features.shape[1], num_classes)
  if num_rows <= terms:
    raise ValueError(f'features has {num_rows} rows, must have more than the {terms} terms.')
  if is_centred:
    logits = logits - logits.mean(1, keepdims=True)
  if width is None:
    slopes, intercept = _solve(features, logits)
    return _float32({'Dense_0': {'kernel': slopes, 'bias': intercept}}, 0)
  fit_key, widen_key = jax.random.split(key)
  if kind == 'random_features':
    return _float32(rescale(_random_features(features, logits, width, fit_key)), width)
  model = _linear(features.shape[1], num_classes)
  if kind == 'spline':
    keep = width - 2 * num_classes
    model = hinge_fit(features, logits, max_terms=1 + 2 * keep, num_knots=num_knots,
                      threshold=1e-4, keep=keep, linear_first=True)
  params = relu_network(_refit(model, features, logits), features.shape[1])
  return _float32(rescale(widen(params, width, widen_key)), model.num_terms)


def check_width(kind: str, width: int | None, num_classes: int, name: str = 'width') -> None:
  """Raises a ValueError unless a hidden layer of this width suits the kind of fit."""
  if width is None:
    if kind != 'ridge':
      raise ValueError(f'{name} is None, must be a number of units: {kind!r} needs a hidden layer.')
  elif kind != 'random_features' and width < 2 * num_classes:
    raise ValueError(f'{name} is {width}, must be at least {2 * num_classes}: a linear map takes '
                     'two units for each class.')


def max_terms(kind: str, width: int | None, num_features: int, num_classes: int) -> int:
  """Returns the most columns of the least-squares problem, with the intercept."""
  if kind == 'random_features':
    return 1 + width
  return 1 + num_features + (width - 2 * num_classes if kind == 'spline' else 0)


def _float32(params, num_terms):
  return FittedHead(jax.tree.map(np.float32, params), num_terms)


def _solve(columns, y):
  """Coefficients of a ridge regression on columns [N, M] with an intercept; and the intercept.

  Columns are not brought to one scale: the penalty then holds down those that hardly vary on these
  images, and would explode on others.
  """
  mean = columns.mean(0)
  z = columns - mean
  gram = z.T @ z
  size = np.diagonal(gram).mean()
  gram += _RIDGE * (size if size > 0 else 1) * np.eye(len(gram))
  slopes = np.linalg.solve(gram, z.T @ (y - y.mean(0)))
  return slopes, y.mean(0) - mean @ slopes


def _linear(num_features, num_classes):
  """A spline without hinges, before its coefficients are fitted."""
  none = np.zeros((0, 1))
  return HingeModel(none.astype(int), none, none, np.zeros((0, num_classes)),
                    np.zeros(num_classes), np.zeros((num_features, num_classes)))


def _refit(model, features, logits):
  """Solves for all coefficients of a spline again, with the penalty of the other kinds.

  Without a penalty, features that nearly depend on others have large coefficients, which float32
  rounds and the student's next steps amplify.
  """
  columns = np.concatenate([features, model.basis(features)], 1)
  slopes, intercept = _solve(columns, logits)
  count = features.shape[1]
  return model._replace(linear=slopes[:count], coefficient=slopes[count:], intercept=intercept)


def _random_features(features, logits, width, key):
  """A hidden layer drawn as by He et al. (arXiv:1502.01852) on standardized features."""
  mean, variance = features.mean(0), features.var(0)
  variance = variance + _RIDGE * variance.mean()  # Some features hardly vary on these images.
  kernel = np.asarray(jax.random.normal(key, (features.shape[1], width)), np.float64)
  kernel *= math.sqrt(2 / features.shape[1])
  kernel /= np.sqrt(np.where(variance > 0, variance, 1))[:, None]
  first = {'kernel': kernel, 'bias': -mean @ kernel}
  slopes, intercept = _solve(np.maximum(features @ kernel + first['bias'], 0), logits)
  return {'Dense_0': first, 'Dense_1': {'kernel': slopes, 'bias': intercept}}
