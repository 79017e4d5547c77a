"""Effects of single features in a sum of hinges, as numbers and as a figure of matplotlib."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfkd_jax.spline.model import HingeModel


def effect(model: HingeModel, feature: int, values: np.ndarray) -> np.ndarray:
  """Sums the terms of one feature alone: values [N] of the feature to [N, C].

  The effects of all features and the intercept sum to the model, unless it has interactions.
  Raises a ValueError if the hinges are of directions instead of features.
  """
  if model.projection is not None:
    raise ValueError('The hinges are of directions, not of features: fit without projection.')
  values = np.asarray(values, np.float64)
  is_own = (model.feature[:, 0] == feature) & (model.slope[:, 1:] == 0).all(1)
  own = model._replace(
      feature=np.zeros_like(model.feature[is_own]), slope=model.slope[is_own],
      knot=model.knot[is_own], coefficient=model.coefficient[is_own],
      intercept=np.zeros_like(model.intercept),
      linear=None if model.linear is None else model.linear[feature:feature + 1])
  return own.predict(values[:, None])


def plot_effects(model: HingeModel, x: np.ndarray, features: Sequence[str] | None = None,
                 responses: Sequence[str] | None = None, columns: int = 4) -> Any:
  """Draws the effect of each feature that has one, over its range in x [N, d].

  Effects are shown without their mean over x. Terms of two features are in no panel. Returns a
  `matplotlib.figure.Figure`; its method `savefig` writes it to a file.

  Args:
    features, responses: Names, d and C of them; by default x0, x1, ... and y0, y1, ...
    columns: Most panels in a row.

  Raises:
    ValueError: The model has hinges of directions, or no effects.
    ImportError: matplotlib, of the extra `plot`, is missing.
  """
  try:
    from matplotlib.figure import Figure  # An extra. A figure without pyplot needs no display.
  except ImportError:
    raise ImportError("plot_effects needs matplotlib: pip install 'dfkd_jax[plot]'.") from None
  x = np.asarray(x, np.float64)
  knots = lambda v: model.knot[(model.feature == v) & (model.slope != 0)]
  curves = {}
  for v in range(x.shape[1]):
    low, high = x[:, v].min(), x[:, v].max()
    grid = np.unique([low, *np.clip(knots(v), low, high), high])
    heights = effect(model, v, grid) - effect(model, v, x[:, v]).mean(0)
    if np.ptp(heights, 0).any():
      curves[v] = grid, heights
  if not curves:
    raise ValueError('The model has no effects of single features to draw.')
  rows, columns = -(-len(curves) // columns), min(columns, len(curves))
  figure = Figure(figsize=(3 * columns, 2.4 * rows), layout='constrained')
  panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
  for panel, (v, (grid, heights)) in zip(panels, curves.items(), strict=False):
    panel.plot(grid, heights, label=[f'y{c}' for c in range(heights.shape[1])]
               if responses is None else list(responses))
    panel.set_xlabel(f'x{v}' if features is None else features[v])
  for panel in panels[len(curves):]:
    panel.remove()
  panels[0].legend(fontsize='small', ncols=math.ceil(model.coefficient.shape[1] / 5))
  return figure
