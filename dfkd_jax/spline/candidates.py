"""Candidates of the forward selection: knots by feature, and the gain of each of them.

All gains are kept up to date by recurrences while the basis grows by one orthonormal column at a
time, so that no candidate needs a least-squares fit of its own.
"""

import math
from typing import NamedTuple

import numpy as np

TOLERANCE = 1e-7  # Share of a column's square norm below which it counts as in the span.


class Hinge(NamedTuple):
  """A hinge max(0, sign * (z[feature] - knot)) on standardized features."""

  feature: int
  sign: int
  knot: float


Term = tuple[Hinge, ...]  # One hinge, or two whose smaller value counts.


class Knots(NamedTuple):
  """Candidate knots of each feature, padded to K."""

  knot: np.ndarray  # [d, K]
  is_one: np.ndarray  # [d, K] bool
  order: np.ndarray  # [N, d], rows by ascending value of each feature.
  first: np.ndarray  # [d, K], rank of the first value above a knot.


def choose_knots(z: np.ndarray, num_knots: int | None, minspan: int | None,
                 endspan: int | None) -> Knots:
  """Chooses candidate knots among the values of each standardized feature of z [N, d].

  Raises a ValueError if minspan or endspan, see `fit.hinge_fit`, is out of range.
  """
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
  return Knots(knot, is_one, order, first)


class Additive:
  """Candidates of one hinge, for all features and knots at once.

  With P the projection away from the columns so far, R the residual, u = z[v] the feature itself
  and g = max(0, u - t) the hinge of a knot t, these are updated with each new column q:

    norm [d, K]: |P g|^2        fit [d, K, C]: g'R        cross [d, K]: g'P u
    linear_norm [d]: |P u|^2    linear_fit [d, C]: u'R
  """

  def __init__(self, z, y, places):
    """Starts without columns: z [N, d] standardized features, y [N, C] responses."""
    self.z, self.places = z, places
    self.ascending = np.take_along_axis(z, places.order, 0)
    ones, knot = np.ones(len(z)), places.knot
    s0, s1 = self._sums(ones), self._sums(ones, 1)
    s2 = self._sums(ones, 2)
    self.norm = s2 - 2 * knot * s1 + knot**2 * s0
    self.cross = s2 - knot * s1
    self.fit = np.stack([self._dot(column) for column in y.T], -1)
    self.linear_norm, self.linear_fit = np.square(z).sum(0), z.T @ y
    self.least = TOLERANCE * self.norm
    self.least_linear = TOLERANCE * self.linear_norm
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
    usual, makes the basis singular, and the coefficients of its solution arbitrarily large. A knot
    at the least value, the only one of a feature of two values, adds the feature itself.
    """
    is_new, slope, norm = self._hinges_apart()
    bends = norm > self.least
    fit = self.fit - slope[..., None] * self.linear_fit[:, None]
    gain = np.where(bends, np.square(fit).sum(-1) / np.where(bends, norm, 1), 0)
    linear_gain = np.square(self.linear_fit).sum(-1) / np.where(is_new, self.linear_norm, 1)
    gain += np.where(is_new, linear_gain, 0)[:, None]
    columns = bends + is_new[:, None].astype(int)
    is_usable = self.is_free & (self.norm > self.least) & (columns > 0) & (columns <= room)
    return np.where(is_usable, gain, -np.inf)

  def _hinges_apart(self):
    """Splits hinges into a slope of their feature, if that is new, and a rest.

    Returns whether each feature is new [d], the slopes [d, K], and the rests' square norms [d, K].
    """
    is_new = self.is_new()
    slope = np.where(is_new, 1 / np.where(is_new, self.linear_norm, 1), 0)[:, None] * self.cross
    return is_new, slope, self.norm - slope * self.cross

  def take(self, index):
    """Returns the terms that a candidate adds, and marks its knot as used."""
    v, k = np.unravel_index(index, self.is_free.shape)
    self.is_free[v, k] = False
    is_new, _, norm = self._hinges_apart()
    signs = (1, -1) if is_new[v] and norm[v, k] > self.least[v, k] else (1,)
    return [(Hinge(int(v), sign, float(self.places.knot[v, k])),) for sign in signs]


class Interactions:
  """Candidates min(parent, hinge) of one parent, for all other features, knots and both signs."""

  def __init__(self, z, parent, columns, residual, places):
    """Starts with the orthonormal columns [N, F] so far and their residual [N, C]; z is [N, d]."""
    v, k = np.nonzero(places.is_one)
    v, k = v[v != parent.feature], k[v != parent.feature]
    self.parent, self.feature = parent, np.tile(v, 2)
    self.sign, self.knot = np.repeat([1, -1], len(v)), np.tile(places.knot[v, k], 2)
    hinges = np.maximum(self.sign * (z[:, self.feature] - self.knot), 0)
    self.column = np.minimum(np.maximum(
        parent.sign * (z[:, parent.feature] - parent.knot), 0)[:, None], hinges)
    norm = np.square(self.column).sum(0)
    self.norm = norm - np.square(columns.T @ self.column).sum(0)
    self.fit, self.least = self.column.T @ residual, TOLERANCE * norm
    self.is_free = norm > 0

  def update(self, q, fit):
    """See `Additive.update`."""
    dot = self.column.T @ q
    self.norm -= dot**2
    self.fit -= dot[:, None] * fit

  def gains(self, room):
    """See `Additive.gains`; [candidates]."""
    is_usable = self.is_free & (self.norm > self.least) & (room > 0)
    gain = np.square(self.fit).sum(-1) / np.where(is_usable, self.norm, 1)
    return np.where(is_usable, gain, -np.inf)

  def take(self, index):
    """See `Additive.take`."""
    self.is_free[index] = False
    hinge = Hinge(int(self.feature[index]), int(self.sign[index]), float(self.knot[index]))
    return [(self.parent, hinge)]
