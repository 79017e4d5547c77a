"""Fully connected heads in closed form, from features and the logits that they should give.

A head is Dense, ReLU, Dense; its read-out is a least-squares solution on a set of images:

  'ridge'            a linear map of the features, by two units for each class
  'random_features'  random units, of which only the read-out is fitted
  'spline'           a linear map and hinges (`hinge_fit`)

Logits are fitted without their mean over classes, which softmax ignores.
"""

import math

import jax
import numpy as np

from dfkd_jax.messages import check_choice
from dfkd_jax.spline.fit import HingeModel, hinge_fit
from dfkd_jax.spline.network import Params, relu_network, rescale, widen
from dfkd_jax.types import PRNGKey

KINDS = ('ridge', 'random_features', 'spline')
_RIDGE = 1e-4  # Penalty, relative to the mean square of the columns.


def fit_head(kind: str, features: np.ndarray, logits: np.ndarray, width: int, key: PRNGKey,
             **options) -> Params:
  """Returns the parameters of a head of `width` units, float32.

  Units that the solution does not need have random weights in and zero weights out, see `widen`.

  Args:
    kind: One of `KINDS`.
    features: [N, D], inputs of the head.
    logits: [N, C], what it should give.
    width: Units of the hidden layer.
    key: For random units.
    options: Further arguments of `hinge_fit`.

  Raises:
    ValueError: The kind is unknown, the width is below 2 C (a linear map needs them), there are too
      few rows, or values are not finite.
  """
  check_choice(kind, KINDS, 'head_init')
  features, logits = np.asarray(features, np.float64), np.asarray(logits, np.float64)
  logits = logits - logits.mean(1, keepdims=True)
  linear = 2 * logits.shape[1]
  if kind != 'random_features' and width < linear:
    raise ValueError(f'width is {width}, must be at least {linear}: a linear map takes two units '
                     'for each class.')
  fit_key, widen_key = jax.random.split(key)
  if kind == 'random_features':
    params = _random_features(features, logits, width, fit_key)
  else:
    model = _ridge(features, logits)
    if kind == 'spline':
      settings = {'num_knots': 20, 'threshold': 1e-4} | options
      model = hinge_fit(features, logits, max_terms=1 + max(1, 2 * (width - linear)),
                        keep=width - linear, linear_first=True, **settings)
    params = widen(relu_network(model, features.shape[1]), width, widen_key)
  return jax.tree.map(np.float32, rescale(params))


def _solve(columns, y):
  """Coefficients of a ridge regression on columns [N, M] with an intercept; and the intercept."""
  mean, scale = columns.mean(0), columns.std(0)
  z = (columns - mean) / np.where(scale > 0, scale, 1)
  gram = z.T @ z + _RIDGE * len(z) * np.eye(z.shape[1])
  slopes = np.linalg.solve(gram, z.T @ (y - y.mean(0))) / np.where(scale > 0, scale, 1)[:, None]
  return slopes, y.mean(0) - mean @ slopes


def _ridge(features, logits):
  """The linear model as a spline without hinges."""
  slopes, intercept = _solve(features, logits)
  none, count = np.zeros((0, 1)), logits.shape[1]
  return HingeModel(none.astype(int), none, none, np.zeros((0, count)), intercept, slopes)


def _random_features(features, logits, width, key):
  """A hidden layer drawn as by He et al. (arXiv:1502.01852) on standardized features."""
  mean, scale = features.mean(0), features.std(0)
  scale = np.where(scale > 0, scale, 1)
  kernel = np.asarray(jax.random.normal(key, (features.shape[1], width)), np.float64)
  kernel *= math.sqrt(2 / features.shape[1])
  kernel /= scale[:, None]
  first = {'kernel': kernel, 'bias': -mean @ kernel}
  slopes, intercept = _solve(np.maximum(features @ kernel + first['bias'], 0), logits)
  return {'Dense_0': first, 'Dense_1': {'kernel': slopes, 'bias': intercept}}
