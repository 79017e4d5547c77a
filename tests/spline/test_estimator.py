"""The regressor of scikit-learn, and effects of single features; both have an extra."""

import sys

import numpy as np
import pytest

from dfkd_jax.spline import hinge_fit
from dfkd_jax.spline.plot import effect, plot_effects

SKLEARN = dict(reason="scikit-learn is not at hand: pip install 'dfkd_jax[sklearn]'")


def draw(rows=211):
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (rows, 3))
  y = np.stack([np.abs(x[:, 0]) + 2 * x[:, 1], np.maximum(x[:, 1] - 0.3, 0)], 1)
  return x, y + 0.01 * rng.normal(size=y.shape)


def test_the_estimator_is_one_of_scikit_learn():
  checks = pytest.importorskip('sklearn.utils.estimator_checks', **SKLEARN)
  from dfkd_jax.spline.estimator import HingeRegressor

  checks.check_estimator(HingeRegressor(), on_skip=None)


def test_the_estimator_is_the_fit():
  pytest.importorskip('sklearn', **SKLEARN)
  from sklearn.base import clone

  from dfkd_jax.spline.estimator import HingeRegressor

  x, y = draw()
  regressor = HingeRegressor(max_terms=7, linear_first=True).set_params(max_terms=9)
  assert clone(regressor).fit(x, y).get_params()['max_terms'] == 9
  fitted = regressor.fit(x[:150], y[:150])
  expected = hinge_fit(x[:150], y[:150], max_terms=9, linear_first=True).predict(x)
  np.testing.assert_array_equal(fitted.predict(x), expected)
  assert regressor.score(x[150:], y[150:]) > 0.99
  assert regressor.fit(x, y[:, 1]).predict(x).shape == (211,)
  with pytest.raises(ValueError, match='max_terms is 0'):
    regressor.set_params(max_terms=0).fit(x, y)


def test_a_missing_extra_is_named(monkeypatch):
  x, y = draw()
  monkeypatch.setitem(sys.modules, 'sklearn.base', None)
  monkeypatch.delitem(sys.modules, 'dfkd_jax.spline.estimator', raising=False)
  with pytest.raises(ImportError, match=r'\A(?!.*\n).*dfkd_jax\[sklearn\]'):
    import dfkd_jax.spline.estimator  # noqa: F401
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  with pytest.raises(ImportError, match=r'\A(?!.*\n).*dfkd_jax\[plot\]'):
    plot_effects(hinge_fit(x, y), x)


@pytest.mark.parametrize('options', [{}, {'linear_first': True}])
def test_effects_sum_to_the_model(options):
  x, y = draw()
  model = hinge_fit(x, y, **options)
  total = model.intercept + sum(effect(model, v, x[:, v]) for v in range(3))
  np.testing.assert_allclose(total, model.predict(x), atol=1e-12)


def test_effects_leave_out_terms_of_two_features():
  x, _ = draw()
  y = x[:, 2] + 3 * np.minimum(np.maximum(x[:, 0], 0), np.maximum(0.2 - x[:, 1], 0))
  model = hinge_fit(x, y, interactions='min', num_knots=15)
  pairs = (model.slope != 0).all(1)
  assert pairs.any()
  alone = model._replace(coefficient=np.where(pairs[:, None], 0, model.coefficient))
  total = model.intercept + sum(effect(model, v, x[:, v]) for v in range(3))
  np.testing.assert_allclose(total, alone.predict(x), atol=1e-12)
  with pytest.raises(ValueError, match='fit without projection'):
    effect(hinge_fit(x, y, projection=1), 0, x[:, 0])


def test_the_plot_has_a_panel_for_each_feature_with_an_effect():
  pytest.importorskip('matplotlib', reason="matplotlib: pip install 'dfkd_jax[plot]'")
  x, y = draw()
  model = hinge_fit(x, y)
  figure = plot_effects(model, x, ['length', 'width', 'age'], ['price', 'risk'], columns=1)
  panels = figure.axes
  assert [panel.get_xlabel() for panel in panels] == ['length', 'width']  # None of the age.
  for v, panel in enumerate(panels):
    for c, line in enumerate(panel.get_lines()):
      expected = effect(model, v, line.get_xdata()) - effect(model, v, x[:, v]).mean(0)
      np.testing.assert_allclose(line.get_ydata(), expected[:, c])
  assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ['price', 'risk']
  one = plot_effects(hinge_fit(x, y[:, 0]), x)
  assert [panel.get_xlabel() for panel in one.axes] == ['x0', 'x1']
  with pytest.raises(ValueError, match='no effects'):
    plot_effects(hinge_fit(x, np.ones(211)), x)
