"""Fits sums of hinges max(0, x - t) to data: a forward selection of knots, then a pruning.

The model is continuous and piecewise linear, so that `network.relu_network` turns it into a network
of one hidden layer that computes the same function. Friedman's adaptive regression splines,
restricted to first degree, with two changes: the basis stays of full rank (see `_Additive.gains`),
and the knots of all features are compared by recurrences instead of a least-squares fit each.

References:
  Friedman, Multivariate Adaptive Regression Splines, Annals of Statistics 19(1), 1991,
  https://doi.org/10.1214/aos/1176347963: knots by equations 43 and 45, pruning by equation 30.
  Mo et al., Exploiting Spline Models for the Training of Fully Connected Layers in Neural Network,
  2021, https://arxiv.org/abs/2102.06554: its first step is such a fit.
"""

import math
from typing import NamedTuple

import numpy as np

from dfkd_jax.messages import check_choice

_TOLERANCE = 1e-7  # Share of a column's square norm below which it counts as in the span.
_CONSTANT = 1e-12  # Deviation, relative to the largest value, below which a feature is constant.
INTERACTIONS = ('none', 'min')


class HingeModel(NamedTuple):
  """intercept + x @ linear + sum over terms of coefficient * min over hinges; float64 arrays.

  A hinge is max(0, slope * (x[feature] - knot)). A term has one hinge, of slope 1 or -1, or the
  smaller one of two.
  """

  feature: np.ndarray  # [H, D] int: columns of x, or of x @ projection; D is 1 or 2.
  slope: np.ndarray  # [H, D]; 0 where a term has no second hinge.
  knot: np.ndarray  # [H, D]
  coefficient: np.ndarray  # [H, C]
  intercept: np.ndarray  # [C]
  linear: np.ndarray | None = None  # [d, C]
  projection: np.ndarray | None = None  # [d, r]

  @property
  def num_terms(self) -> int:
    """Number of hinge terms H."""
    return len(self.coefficient)

  def basis(self, x: np.ndarray) -> np.ndarray:
    """Values of the terms, [N, d] to [N, H]."""
    x = np.asarray(x, np.float64)
    x = x if self.projection is None else x @ self.projection
    if not self.num_terms:
      return np.zeros((len(x), 0))
    hinges = np.maximum(self.slope * (x[:, self.feature] - self.knot), 0)
    return np.where(self.slope == 0, np.inf, hinges).min(-1)

  def predict(self, x: np.ndarray) -> np.ndarray:
    """Values of the model, [N, d] to [N, C]."""
    values = self.basis(x) @ self.coefficient + self.intercept
    return values if self.linear is None else values + np.asarray(x, np.float64) @ self.linear


def hinge_fit(
    x: np.ndarray, y: np.ndarray, *, max_terms: int = 21, num_knots: int | None = None,
    threshold: float = 1e-3, penalty: float | None = None, prune: bool = True,
    keep: int | None = None, linear_first: bool = False, projection: int | None = None,
    interactions: str = 'none', minspan: int | None = None, endspan: int | None = None,
) -> HingeModel:
  """Fits hinges to responses that share them, by least squares in float64.

  Args:
    x: [N, d] features; scale and shift do not matter.
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
  mean, scale = inputs.mean(0), inputs.std(0)
  varies = scale > _CONSTANT * np.maximum(np.abs(inputs).max(0), np.finfo(float).tiny)
  z = (inputs[:, varies] - mean[varies]) / scale[varies]
  start = [np.ones((len(x), 1))]
  if linear_first:
    start.append((x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1))
  start = np.concatenate(start, 1)
  if len(x) <= start.shape[1]:
    raise ValueError(f'x has {len(x)} rows, must have more than its {start.shape[1]} terms.')
  places = _knots(z, num_knots, minspan, endspan)
  terms = _forward(z, y, start, places, min(max_terms, len(x) - start.shape[1]), threshold,
                   interactions == 'min')
  basis = _columns(z, terms)
  if prune or keep is not None:
    penalty = (2.0 if interactions == 'none' else 3.0) if penalty is None else penalty
    kept = _backward(start, basis, y, terms, penalty, keep)
    terms, basis = [terms[i] for i in kept], basis[:, kept]
  solution = np.linalg.lstsq(np.concatenate([start, basis], 1), y, rcond=None)[0]
  return _in_units_of_x(x, solution, start.shape[1], terms, np.flatnonzero(varies), mean, scale,
                        directions)


def table(model: HingeModel, features: list[str] | None = None,
          responses: list[str] | None = None) -> str:
  """Formats a line for each term: its hinges, and its slope in each response."""
  count = model.coefficient.shape[1]
  responses = [f'y{c}' for c in range(count)] if responses is None else responses
  name = lambda v: (f'u{v}' if model.projection is not None else
                    f'x{v}' if features is None else features[v])

  def hinge(v, slope, t):
    factor = '' if abs(slope) == 1 else f'{abs(slope):.4g} * '
    difference = f'{name(v)} - {t:.4g}' if slope > 0 else f'{t:.4g} - {name(v)}'
    return f'{factor}max(0, {difference.replace("- -", "+ ")})'

  rows = [('intercept', model.intercept)]
  if model.linear is not None:
    rows += [(f'x{v}' if features is None else features[v], slopes)
             for v, slopes in enumerate(model.linear)]
  for term in zip(model.feature, model.slope, model.knot, model.coefficient, strict=True):
    hinges = [hinge(*one) for one in zip(*term[:3], strict=True) if one[1]]
    rows.append((hinges[0] if len(hinges) == 1 else f'min({", ".join(hinges)})', term[3]))
  width = max(len(title) for title, _ in rows) + 2
  lines = [f'{"term":{width}}' + ''.join(f'{name:>12}' for name in responses)]
  lines += [f'{title:{width}}' + ''.join(f'{value:12.4g}' for value in values)
            for title, values in rows]
  return '\n'.join(lines)


class _Hinge(NamedTuple):
  """A hinge max(0, sign * (z[feature] - knot)) on standardized features."""

  feature: int
  sign: int
  knot: float


_Term = tuple[_Hinge, ...]  # One hinge, or two whose smaller value counts.


class _Places(NamedTuple):
  """Candidate knots of each feature, padded to K."""

  knot: np.ndarray  # [d, K]
  is_one: np.ndarray  # [d, K] bool
  order: np.ndarray  # [N, d], rows by ascending value of each feature.
  first: np.ndarray  # [d, K], rank of the first value above a knot.


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


def _leading_directions(x, y, count):
  """Orthonormal directions [d, r] that the coefficients of the linear fit span."""
  if not 1 <= count <= min(x.shape[1], y.shape[1]):
    raise ValueError(f'projection is {count}, must be from 1 to {min(x.shape[1], y.shape[1])}.')
  slopes = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
  return np.linalg.svd(slopes, full_matrices=False)[0][:, :count]


def _knots(z, num_knots, minspan, endspan):
  """Chooses candidate knots among the values of each feature."""
  rows, features = z.shape
  if endspan is None:
    endspan = math.ceil(3 - math.log2(0.05 / max(features, 1)))
  if minspan is None:
    minspan = max(1, int(-math.log2(-math.log(0.95) / (max(features, 1) * rows)) / 2.5))
  for name, value, least in (('minspan', minspan, 1), ('endspan', endspan, 0)):
    if value < least:
      raise ValueError(f'{name} is {value}, must be at least {least}.')
  order = np.argsort(z, axis=0, kind='stable')
  ascending = np.take_along_axis(z, order, 0)
  chosen = []
  for values in ascending.T:
    # A knot at the largest value, or beyond, would give a hinge that is 0 in all rows.
    knots = np.unique(values[endspan:rows - endspan:minspan])
    knots = knots[(knots < values[-1]) & (knots >= values[0])]
    if num_knots is not None and len(knots) > num_knots:
      knots = knots[np.linspace(0, len(knots) - 1, num_knots).round().astype(int)]
    chosen.append(knots)
  width = max((len(knots) for knots in chosen), default=0)
  knot, is_one = np.zeros((features, width)), np.zeros((features, width), bool)
  for v, knots in enumerate(chosen):
    knot[v, :len(knots)], is_one[v, :len(knots)] = knots, True
  first = np.stack([np.searchsorted(values, knots, 'right')
                    for values, knots in zip(ascending.T, knot, strict=True)]
                   ) if features else np.zeros((0, width), int)
  return _Places(knot, is_one, order, first)


class _Additive:
  """Candidates of one hinge, for all features and knots at once.

  With P the projection away from the columns so far, R the residual, u = z[v] the feature itself
  and g = max(0, u - t) the hinge of a knot t, these are updated with each new column q:

    norm [d, K]: |P g|^2        fit [d, K, C]: g'R        cross [d, K]: g'P u
    linear_norm [d]: |P u|^2    linear_fit [d, C]: u'R
  """

  def __init__(self, z, y, places):
    self.z, self.places = z, places
    self.ascending = np.take_along_axis(z, places.order, 0)
    ones, knot = np.ones(len(z)), places.knot
    s0, s1 = self._sums(ones), self._sums(ones, 1)
    s2 = self._sums(ones, 2)
    self.norm = s2 - 2 * knot * s1 + knot**2 * s0
    self.cross = s2 - knot * s1
    self.fit = np.stack([self._dot(column) for column in y.T], -1)
    self.linear_norm, self.linear_fit = np.square(z).sum(0), z.T @ y
    self.least = _TOLERANCE * self.norm
    self.least_linear = _TOLERANCE * self.linear_norm
    self.is_free = places.is_one & (self.norm > 0)

  def _sums(self, q, power=0):
    """Sums of z^power q over the rows above each knot, [d, K]."""
    weights = q[self.places.order] * self.ascending**power
    sums = np.zeros((len(q) + 1, weights.shape[1]))
    sums[:-1] = np.cumsum(weights[::-1], 0)[::-1]
    return np.take_along_axis(sums.T, self.places.first, 1)

  def _dot(self, q):
    """Products g'q of all candidates, [d, K]."""
    return self._sums(q, 1) - self.places.knot * self._sums(q)

  def update(self, q, fit):
    """Takes a new orthonormal column q [N]; its product with the residual is `fit` [C]."""
    dot, linear_dot = self._dot(q), self.z.T @ q
    self.norm -= dot**2
    self.fit -= dot[..., None] * fit
    self.cross -= dot * linear_dot[:, None]
    self.linear_norm -= linear_dot**2
    self.linear_fit -= linear_dot[:, None] * fit

  def is_new(self):
    """Whether a feature itself is outside of the span of the columns, [d]."""
    return self.linear_norm > self.least_linear

  def gains(self, room):
    """Decrease of the residual's sum of squares by each candidate, [d, K]; -inf: none.

    Once a feature is in the span, max(0, z - t) and max(0, t - z) differ by a column of the span:
    only the first knot of a feature adds two columns. Adding both hinges of every knot, as is
    usual, makes the basis singular, and the coefficients of its solution arbitrarily large.
    """
    is_new = self.is_new()[:, None]
    linear_norm = np.where(is_new, self.linear_norm[:, None], 1)
    slope = np.where(is_new, self.cross / linear_norm, 0)
    norm = self.norm - slope * self.cross
    fit = self.fit - slope[..., None] * self.linear_fit[:, None]
    is_usable = self.is_free & (norm > self.least)
    gain = np.square(fit).sum(-1) / np.where(is_usable, norm, 1)
    linear_gain = np.square(self.linear_fit).sum(-1)[:, None] / linear_norm
    gain += np.where(is_new, linear_gain, 0)
    return np.where(is_usable & (np.where(is_new, 2, 1) <= room), gain, -np.inf)

  def take(self, index):
    """Returns the terms that a candidate adds, and marks its knot as used."""
    v, k = np.unravel_index(index, self.is_free.shape)
    self.is_free[v, k] = False
    signs = (1, -1) if self.is_new()[v] else (1,)
    return [(_Hinge(int(v), sign, float(self.places.knot[v, k])),) for sign in signs]


class _Interactions:
  """Candidates min(parent, hinge) of one parent, for all other features, knots and both signs."""

  def __init__(self, z, parent, columns, residual, places):
    v, k = np.nonzero(places.is_one)
    v, k = v[v != parent.feature], k[v != parent.feature]
    self.parent, self.feature = parent, np.tile(v, 2)
    self.sign, self.knot = np.repeat([1, -1], len(v)), np.tile(places.knot[v, k], 2)
    hinges = np.maximum(self.sign * (z[:, self.feature] - self.knot), 0)
    self.column = np.minimum(np.maximum(
        parent.sign * (z[:, parent.feature] - parent.knot), 0)[:, None], hinges)
    norm = np.square(self.column).sum(0)
    self.norm = norm - np.square(columns.T @ self.column).sum(0)
    self.fit, self.least = self.column.T @ residual, _TOLERANCE * norm
    self.is_free = norm > 0

  def update(self, q, fit):
    """As of `_Additive`."""
    dot = self.column.T @ q
    self.norm -= dot**2
    self.fit -= dot[:, None] * fit

  def gains(self, room):
    """As of `_Additive`."""
    is_usable = self.is_free & (self.norm > self.least) & (room > 0)
    gain = np.square(self.fit).sum(-1) / np.where(is_usable, self.norm, 1)
    return np.where(is_usable, gain, -np.inf)

  def take(self, index):
    """As of `_Additive`."""
    self.is_free[index] = False
    hinge = _Hinge(int(self.feature[index]), int(self.sign[index]), float(self.knot[index]))
    return [(self.parent, hinge)]


def _columns(z, terms):
  """Values of terms, [N, H]."""
  columns = np.zeros((len(z), len(terms)))
  for i, term in enumerate(terms):
    columns[:, i] = np.min([np.maximum(sign * (z[:, v] - t), 0) for v, sign, t in term], 0)
  return columns


def _forward(z, y, start, places, max_terms, threshold, interacts):
  """Selects terms, one knot at a time, by the largest decrease of the squared residual."""
  residual, columns = y.copy(), np.zeros((len(z), 0))
  groups = [_Additive(z, y, places)]
  total, terms = np.square(y - y.mean(0)).sum(), []

  def add(new):
    nonlocal residual, columns
    for column in new.T:
      norm = np.linalg.norm(column)
      for _ in range(2):  # Once leaves an error that grows with the number of columns.
        column = column - columns @ (columns.T @ column)
      length = np.linalg.norm(column)
      if length**2 <= _TOLERANCE * norm**2:
        continue
      q = column / length
      fit = q @ residual
      residual = residual - np.outer(q, fit)
      columns = np.concatenate([columns, q[:, None]], 1)
      for group in groups:
        group.update(q, fit)

  add(start)
  while len(terms) + 1 < max_terms and np.square(residual).sum() > 1e-12 * total:
    gains = [group.gains(max_terms - 1 - len(terms)) for group in groups]
    best = max(range(len(groups)), key=lambda i: gains[i].max(initial=-np.inf))
    if gains[best].max(initial=-np.inf) <= max(threshold * total, 0):
      break
    new = groups[best].take(gains[best].argmax())
    terms += new
    add(_columns(z, new))
    if interacts and best == 0:
      groups += [_Interactions(z, term[0], columns, residual, places) for term in new]
  return terms


def _backward(start, basis, y, terms, penalty, keep):
  """Returns the terms to keep: `keep` of them, or as many as give the least score."""
  fixed, rows = start.shape[1], len(y)
  # The QR decomposition leaves out columns of `start` that depend on others.
  start = np.linalg.svd(start, full_matrices=False)
  start = start[0][:, start[1] > _TOLERANCE**0.5 * start[1][0]]
  fixed = start.shape[1]
  q, r = np.linalg.qr(np.concatenate([start, basis], 1))
  inverse = np.linalg.inv(r)
  solution, inverse = inverse @ (q.T @ y), inverse @ inverse.T
  rss = np.square(y - q @ (q.T @ y)).sum()
  left, best = list(range(len(terms))), (np.inf, [])
  while True:
    knots = len({(hinge.feature, hinge.knot) for i in left for hinge in terms[i]})
    parameters = fixed + len(left) + penalty * knots
    score = rss / (1 - parameters / rows)**2 if parameters < rows else np.inf
    if len(left) == keep or (keep is not None and len(left) < keep):
      return left
    if score <= best[0]:
      best = score, list(left)
    if not left:
      return left if keep is not None else best[1]
    costs = np.square(solution[fixed:]).sum(1) / np.diagonal(inverse)[fixed:]
    drop = int(costs.argmin())
    rss += costs[drop]
    row = fixed + drop
    column, pivot = inverse[:, row].copy(), inverse[row, row]
    solution = np.delete(solution - np.outer(column, solution[row]) / pivot, row, 0)
    inverse = inverse - np.outer(column, column) / pivot
    inverse = np.delete(np.delete(inverse, row, 0), row, 1)
    del left[drop]


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
    linear = solution[1:fixed] / np.where(x.std(0) > 0, x.std(0), 1)[:, None]
    intercept -= x.mean(0) @ linear
  return HingeModel(feature, slope, knot, coefficient, intercept, linear, directions)
