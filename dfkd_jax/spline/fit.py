"""Fits sums of hinges max(0, x - t) to data: a forward selection of knots, then a pruning.

The model is continuous and piecewise linear, so that `network.relu_network` turns it into a network
of one hidden layer that computes the same function. These are Friedman's adaptive regression
splines, restricted to first degree, with two changes. The basis stays of full rank, see
`candidates.Additive.gains`. The knots of all features are compared by recurrences instead of a
least-squares fit each.

References:
  Friedman, Multivariate Adaptive Regression Splines, Annals of Statistics 19(1), 1991,
  https://doi.org/10.1214/aos/1176347963: knots by equations 43 and 45, pruning by equation 30.
  Mo et al., Exploiting Spline Models for the Training of Fully Connected Layers in Neural Network,
  2021, https://arxiv.org/abs/2102.06554: its first step is such a fit.
"""

import numpy as np

from dfkd_jax.messages import check_choice
from dfkd_jax.spline.candidates import choose_knots
from dfkd_jax.spline.model import HingeModel
from dfkd_jax.spline.selection import prune_terms, select_terms, term_columns

_CONSTANT = 1e-12  # Deviation, relative to the largest value, below which a feature is constant.
INTERACTIONS = ('none', 'min')


def hinge_fit(
    x: np.ndarray, y: np.ndarray, *, max_terms: int = 21, num_knots: int | None = None,
    threshold: float = 1e-3, penalty: float | None = None, prune: bool = True,
    keep: int | None = None, linear_first: bool = False, projection: int | None = None,
    interactions: str = 'none', minspan: int | None = None, endspan: int | None = None,
) -> HingeModel:
  """Fits hinges to responses that share them, by least squares in float64.

  Args:
    x: [N, d] features; scale and shift do not matter, except to the directions of `projection`.
    y: [N] or [N, C] responses. Bring columns of different variance to one scale first.
    max_terms: Most columns of the basis in the forward pass, with the intercept. Columns of
      `linear_first` are not counted.
    num_knots: Most knots a feature, at equal ranks; None: all that minspan and endspan allow.
    threshold: Least share of the total sum of squares that a step of the forward pass must explain.
    penalty: Parameters that a knot costs in the pruning; None: 2, or 3 with interactions.
    prune: Whether to drop the terms that generalized cross-validation finds superfluous.
    keep: Number of hinge terms to keep, the last ones that the pruning would drop, in place of
      cross-validation. Fewer are kept where the forward pass finds fewer.
    linear_first: Whether the fit starts from a linear one. Needed from about 50 features on, where
      one feature at a time comes less far than a linear map.
    projection: Number of directions to look for knots in: the leading ones of the linear fit. None:
      the features themselves.
    interactions: 'none', or 'min': a term may also be the smaller one of two hinges, of different
      features. Takes memory for every pair of a term and a knot.
    minspan: Observations between knots; None: equation 43 of Friedman (1991).
    endspan: Observations beyond the outer knots; None: equation 45.

  Raises:
    ValueError: Too few rows, values that are not finite, shapes that do not fit, or an option out
      of range.
  """
  x, y = check_arrays(x, y)
  check_choice(interactions, INTERACTIONS, 'interactions')
  if max_terms < 1:
    raise ValueError(f'max_terms is {max_terms}, must be at least 1.')
  directions = None if projection is None else _leading_directions(x, y, projection)
  inputs = x if directions is None else x @ directions
  mean, scale, varies = inputs.mean(0), scale_of(inputs), is_varying(inputs)
  z = (inputs[:, varies] - mean[varies]) / scale[varies]
  start = [np.ones((len(x), 1))]
  if linear_first:
    start.append((x - x.mean(0)) / scale_of(x))
  start = np.concatenate(start, 1)
  if len(x) <= start.shape[1]:
    raise ValueError(f'x has {len(x)} rows, must have more than its {start.shape[1]} terms.')
  places = choose_knots(z, num_knots, minspan, endspan)
  terms = select_terms(z, y, start, places, min(max_terms, len(x) - start.shape[1]), threshold,
                   interactions == 'min')
  basis = term_columns(z, terms)
  if prune or keep is not None:
    penalty = (2.0 if interactions == 'none' else 3.0) if penalty is None else penalty
    kept = prune_terms(start, basis, y, terms, penalty, keep)
    terms, basis = [terms[i] for i in kept], basis[:, kept]
  solution = np.linalg.lstsq(np.concatenate([start, basis], 1), y, rcond=None)[0]
  return _in_units_of_x(x, solution, start.shape[1], terms, np.flatnonzero(varies), mean, scale,
                        directions)


def check_arrays(
    x: np.ndarray, y: np.ndarray, names: tuple[str, str] = ('x', 'y')
) -> tuple[np.ndarray, np.ndarray]:
  """Returns x [N, d] and y [N] or [N, C] as float64, y with both axes.

  Raises a ValueError that has their names unless they are finite numbers of such shapes.
  """
  first, second = names
  try:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{first} and {second} must be numbers: {error}') from None
  y = y[:, None] if y.ndim == 1 else y
  if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not y.shape[1] or not x.shape[1]:
    raise ValueError(f'{first} has shape {x.shape} and {second} {y.shape}, must have [N, d] and '
                     '[N] or [N, C].')
  for name, values in ((first, x), (second, y)):
    if not np.isfinite(values).all():
      row = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
      raise ValueError(f'{name} has a value in row {row} that is not finite: drop or fill it.')
  return x, y


def is_varying(values: np.ndarray) -> np.ndarray:
  """Whether each column of values [N, d] differs by more than rounding, [d] bool."""
  return values.std(0) > _CONSTANT * np.maximum(np.abs(values).max(0), np.finfo(float).tiny)


def scale_of(values: np.ndarray) -> np.ndarray:
  """Returns the standard deviation of each column of values [N, d], 1 for constant ones."""
  return np.where(is_varying(values), values.std(0), 1)


def _leading_directions(x, y, count):
  """Orthonormal directions [d, r] that the coefficients of the linear fit span."""
  if not 1 <= count <= min(x.shape[1], y.shape[1]):
    raise ValueError(f'projection is {count}, must be from 1 to {min(x.shape[1], y.shape[1])}.')
  slopes = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
  return np.linalg.svd(slopes, full_matrices=False)[0][:, :count]


def _in_units_of_x(x, solution, fixed, terms, features, mean, scale, directions):
  """Makes the model of the solution [fixed + H, C] on standardized features."""
  depth = max((len(term) for term in terms), default=1)
  feature = np.zeros((len(terms), depth), int)
  slope, knot = np.zeros((len(terms), depth)), np.zeros((len(terms), depth))
  coefficient, intercept, linear = solution[fixed:].copy(), solution[0].copy(), None
  for i, term in enumerate(terms):
    for j, hinge in enumerate(term):
      v = features[hinge.feature]
      feature[i, j], knot[i, j] = v, mean[v] + scale[v] * hinge.knot
      slope[i, j] = hinge.sign / scale[v]
    if len(term) == 1:  # A slope of 1 or -1 keeps the first layer of the network exact.
      coefficient[i] *= np.abs(slope[i, 0])
      slope[i, 0] = np.sign(slope[i, 0])
  if fixed > 1:
    linear = solution[1:fixed] / scale_of(x)[:, None]
    intercept -= x.mean(0) @ linear
  return HingeModel(feature, slope, knot, coefficient, intercept, linear, directions)
