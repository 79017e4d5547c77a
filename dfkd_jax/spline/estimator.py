"""Fits of hinges as a regressor of scikit-learn, which the extra `sklearn` installs."""

import numpy as np

from dfkd_jax.spline.fit import hinge_fit

try:
  from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
  from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError:
  raise ImportError("HingeRegressor needs scikit-learn 1.6 or later: "
                    "pip install 'dfkd_jax[sklearn]'.") from None


class HingeRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
  """Sums of hinges by `hinge_fit`, which documents the arguments.

  Attributes, after `fit`:
    model_: The HingeModel, for `relu_network`, `table` and `plot_effects`.
    n_features_in_: Number of features d.
  """

  def __init__(
      self, *, max_terms: int = 21, num_knots: int | None = None, threshold: float = 1e-3,
      penalty: float | None = None, prune: bool = True, keep: int | None = None,
      linear_first: bool = False, projection: int | None = None, interactions: str = 'none',
      minspan: int | None = None, endspan: int | None = None):
    self.max_terms, self.num_knots, self.threshold = max_terms, num_knots, threshold
    self.penalty, self.prune, self.keep = penalty, prune, keep
    self.linear_first, self.projection, self.interactions = linear_first, projection, interactions
    self.minspan, self.endspan = minspan, endspan

  def fit(self, X, y) -> 'HingeRegressor':
    """Fits features X [N, d] to responses y [N] or [N, C].

    Raises a ValueError for values that are not finite numbers, or an argument out of range.
    """
    X, y = validate_data(
        self, X, y, dtype=np.float64, y_numeric=True, multi_output=True, ensure_min_samples=2)
    self.model_ = hinge_fit(X, y, **self.get_params())
    self._is_vector = y.ndim == 1
    return self

  def predict(self, X) -> np.ndarray:
    """Returns the values of the model at X [N, d], of the shape that y had in `fit`."""
    check_is_fitted(self)
    values = self.model_.predict(validate_data(self, X, reset=False, dtype=np.float64))
    return values[:, 0] if self._is_vector else values
