"""Regression on a table: a spline, the network that equals it, and that network fine-tuned."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dfkd_jax.spline.fit import check_arrays, hinge_fit, scale_of
from dfkd_jax.spline.model import HingeModel
from dfkd_jax.spline.network import (
    Params,
    hinge_mask,
    mask_updates,
    network_of,
    relu_network,
    rescale,
)
from dfkd_jax.spline.tabular import Table

_WARMUP = 20  # A share of 1 / 20 of the steps; a full first step can leave the spline's solution.


class Comparison(NamedTuple):
  """Models of one table, and their root mean squared errors on the test rows."""

  model: HingeModel
  network: Params  # Equals the model; float64.
  tuned: Params  # After fine-tuning; float64.
  train_rows: np.ndarray  # Indices into the table.
  test_rows: np.ndarray
  errors: dict[str, float]  # By name of the model, in units of the target.


def compare(table: Table, *, max_terms: int = 21, test_share: float = 0.2, num_steps: int = 2000,
            learning_rate: float = 1e-3, is_sparse: bool = True, seed: int = 0) -> Comparison:
  """Fits a spline to a part of a table, and compares it with other models on the rest.

  The other models are the mean, a linear map, the spline's network before and after fine-tuning,
  and a random network of the same width. The last one has as many steps, at ten times the rate.

  Args:
    table: To fit.
    max_terms: Most terms of the forward pass, see `hinge_fit`; the pruning leaves fewer.
    test_share: Share of the rows to test on, in (0, 1).
    num_steps, learning_rate, is_sparse: Of `fine_tune`.
    seed: Of the split, and of the random network.

  Raises:
    ValueError: A share or number is out of range, or there are too few rows for the terms.
  """
  if not 0 < test_share < 1:
    raise ValueError(f'test_share is {test_share}, must be in (0, 1).')
  count = math.ceil(test_share * len(table.x))
  order = np.random.default_rng(seed).permutation(len(table.x))
  test, train = order[:count], order[count:]
  terms = max(max_terms, table.x.shape[1] + 1)
  if len(train) <= terms:
    raise ValueError(f'The fit has {len(train)} rows, must have more than its {terms} terms.')
  x, y = table.x[train], table.y[train, None]
  model = hinge_fit(x, y, max_terms=max_terms)
  network = relu_network(model, x.shape[1])
  options = dict(num_steps=num_steps, is_sparse=is_sparse)
  tuned = fine_tune(network, x, y, learning_rate=learning_rate, **options)
  fresh = fine_tune(_random_network(network, x, y, seed), x, y, num_steps=num_steps,
                    learning_rate=10 * learning_rate)
  ones = lambda x: np.concatenate([np.ones((len(x), 1)), x - table.x[train].mean(0)], 1)
  linear = np.linalg.lstsq(ones(x), y, rcond=None)[0]
  x, y = table.x[test], table.y[test, None]
  values = {
      'mean': table.y[train].mean(), 'linear': ones(x) @ linear, 'spline': model.predict(x),
      'network of the spline': predict(network, x), 'fine-tuned': predict(tuned, x),
      'random network': predict(fresh, x)}
  errors = {name: float(np.sqrt(np.square(value - y).mean())) for name, value in values.items()}
  return Comparison(model, network, tuned, train, test, errors)


def predict(params: Params, x: np.ndarray) -> np.ndarray:
  """Values of a network at x [N, d], float32 [N, C]."""
  network = network_of(params, jax.lax.Precision.HIGHEST)
  return np.asarray(network.apply({'params': jax.tree.map(np.float32, params)}, np.float32(x)))


def fine_tune(params: Params, x: np.ndarray, y: np.ndarray, *, num_steps: int = 2000,
              learning_rate: float = 1e-3, is_sparse: bool = False) -> Params:
  """Trains a network on all rows at once, by Adam on the mean squared error.

  Features and responses are standardized for the training. The rate grows in the first twentieth of
  the steps, and then falls to 0 as a cosine.

  Args:
    params: Of `relu_network`, in units of x and y; so are the results.
    x: [N, d] features.
    y: [N] or [N, C] responses.
    num_steps: Steps.
    learning_rate: Largest rate.
    is_sparse: Whether weights of 0 before the last layer stay 0. The units of a spline then stay
      hinges of one feature each.
  """
  x, y = check_arrays(x, y)
  mean, scale, centre, size = x.mean(0), scale_of(x), y.mean(0), scale_of(y)
  standard = rescale(_in_units(params, mean, scale, centre, size))
  mask = hinge_mask(standard) if is_sparse else jax.tree.map(np.ones_like, standard)
  standard = jax.tree.map(np.float32, standard)
  tx = optax.chain(
      optax.adam(optax.warmup_cosine_decay_schedule(
          0.0, learning_rate, max(1, num_steps // _WARMUP), max(2, num_steps))),
      mask_updates(mask))
  network = network_of(standard)

  @jax.jit
  def train(params, x, y):
    def step(carry, _):
      params, state = carry
      grads = jax.grad(
          lambda params: jnp.square(network.apply({'params': params}, x) - y).mean())(params)
      updates, state = tx.update(grads, state)
      return (optax.apply_updates(params, updates), state), None

    return lax.scan(step, (params, tx.init(params)), None, num_steps)[0][0]

  trained = train(standard, np.float32((x - mean) / scale), np.float32((y - centre) / size))
  return _in_units(jax.tree.map(np.float64, trained), -mean / scale, 1 / scale, -centre / size,
                   1 / size)


def _in_units(params, mean, scale, centre, size):
  """The network of (x - mean) / scale, [d] each, whose values are (y - centre) / size, [C]."""
  params = {name: dict(layer) for name, layer in params.items()}
  first, last = params['Dense_0'], params[f'Dense_{len(params) - 1}']
  first['bias'] = first['bias'] + mean @ first['kernel']
  first['kernel'] = first['kernel'] * scale[:, None]
  last['kernel'], last['bias'] = last['kernel'] / size, (last['bias'] - centre) / size
  return params


def _random_network(params, x, y, seed):
  """Fresh parameters of the same shapes, for standardized features, in units of x and y."""
  network = network_of(params)
  fresh = network.init(jax.random.key(seed), np.zeros((1, x.shape[1]), np.float32))['params']
  fresh = jax.tree.map(np.float64, fresh)
  mean, scale, centre, size = x.mean(0), scale_of(x), y.mean(0), scale_of(y)
  return _in_units(fresh, -mean / scale, 1 / scale, -centre / size, 1 / size)
