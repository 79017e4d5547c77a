"""Networks of splines: the same function, also after they are widened, deepened and rescaled."""

import jax
import numpy as np
import optax
import pytest

from dfkd_jax.spline import hinge_fit, relu_network
from dfkd_jax.spline.network import deepen, hinge_mask, mask_updates, network_of, rescale, widen

OPTIONS = [{}, {'linear_first': True}, {'interactions': 'min', 'num_knots': 8}, {'projection': 2},
           {'interactions': 'min', 'num_knots': 8, 'linear_first': True}]


def fitted(options, rows=200):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(rows, 4))
  y = np.maximum(x @ rng.normal(size=(4, 6)), 0) @ rng.normal(size=(6, 3))
  model = hinge_fit(x, y, **options)
  assert model.num_terms > 2
  return model, np.concatenate([x, 1e6 * rng.normal(size=(20, 4))])


def values(params, x, dtype=np.float64):
  with jax.enable_x64(dtype == np.float64):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    network = network_of(params, jax.lax.Precision.HIGHEST)
    return np.asarray(network.apply({'params': params}, x.astype(dtype)))


@pytest.mark.parametrize('options', OPTIONS)
def test_the_network_equals_the_spline_everywhere(options):
  model, x = fitted(options)
  params = relu_network(model, 4)
  expected = model.predict(x)
  scale = np.abs(expected).max(1, keepdims=True)
  np.testing.assert_allclose(values(params, x) / scale, expected / scale, atol=1e-12)
  np.testing.assert_allclose(values(params, x, np.float32) / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize('options', OPTIONS)
def test_changes_of_shape_keep_the_function(options):
  model, x = fitted(options)
  params = relu_network(model, 4)
  expected = values(params, x)
  scale = np.abs(expected).max(1, keepdims=True)
  same = lambda changed: np.testing.assert_allclose(
      values(changed, x) / scale, expected / scale, atol=1e-12)
  wide = widen(params, 70, jax.random.key(1))
  assert network_of(wide).widths[-1] == 70
  same(wide)
  deep = deepen(params, 2)
  assert len(deep) == len(params) + 2
  same(deep)
  np.testing.assert_array_equal(values(rescale(params), x), expected)


def test_rescaling_balances_the_weights_of_units():
  params = relu_network(fitted({})[0], 4)
  params['Dense_1']['kernel'] *= 100.0
  ratio = lambda params: np.log2(
      np.linalg.norm(params['Dense_1']['kernel'], axis=1)
      / np.hypot(np.linalg.norm(params['Dense_0']['kernel'], axis=0), params['Dense_0']['bias']))
  assert np.abs(ratio(params)).max() > 4
  assert np.abs(ratio(rescale(params))).max() <= 1


def test_an_intercept_alone_has_no_units():
  model = hinge_fit(np.random.default_rng(0).normal(size=(50, 2)), np.full(50, 3.0))
  params = relu_network(model, 2)
  assert params['Dense_0']['kernel'].shape == (2, 0)
  np.testing.assert_allclose(values(params, np.ones((4, 2))), 3.0)
  assert widen(params, 5, jax.random.key(0))['Dense_0']['kernel'].shape == (2, 5)


def test_too_narrow_a_width_is_refused():
  params = relu_network(fitted({})[0], 4)
  with pytest.raises(ValueError, match=r'\Awidth is 1, must be at least \d+, the units'):
    widen(params, 1, jax.random.key(0))


@pytest.mark.parametrize('is_masked', [True, False])
def test_new_units_learn_and_masked_weights_stay_zero(is_masked):
  model, x = fitted({})
  params = widen(relu_network(model, 4), 20, jax.random.key(2))
  params = jax.tree.map(np.float32, params)
  x, y = np.float32(x[:200]), np.float32(np.sin(model.predict(x[:200])))
  tx, network = optax.adam(1e-3), network_of(params)
  if is_masked:
    tx = optax.chain(tx, mask_updates(hinge_mask(params)))

  @jax.jit
  def step(params, state):
    loss = lambda params: ((network.apply({'params': params}, x) - y)**2).mean()
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  tuned, state = params, tx.init(params)
  losses = []
  for _ in range(60):
    tuned, state, loss = step(tuned, state)
    losses.append(float(loss))
  assert losses[-1] < 0.9 * losses[0]
  before, after = params['Dense_0']['kernel'], np.asarray(tuned['Dense_0']['kernel'])
  hinges = before[:, :model.num_terms]
  assert ((after[:, :model.num_terms] != 0) == (hinges != 0)).all() == is_masked
  assert np.abs(after[:, model.num_terms:] - before[:, model.num_terms:]).max() > 0
