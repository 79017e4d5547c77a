"""The model: a sum of hinges, and its table of terms."""

from typing import NamedTuple

import numpy as np


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


def format_terms(model: HingeModel, features: list[str] | None = None,
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
