"""Heads in closed form, compared with least squares and with each other."""

import jax
import numpy as np
import pytest

from dfkd_jax.spline.head_init import KINDS, check_width, fit_head, max_terms
from dfkd_jax.spline.network import network_of

ROWS, FEATURES, CLASSES = 301, 6, 3
KEY = jax.random.key(3)


def draw(seed=0, is_linear=False):
  """Features of a ReLU layer, and logits; some features are constant, or nearly."""
  rng = np.random.default_rng(seed)
  features = np.maximum(rng.normal(size=(ROWS, FEATURES)), -0.5) + 0.5
  features[:, 4] = 0.0
  features[:, 5] *= 1e-6
  values = features @ rng.normal(size=(FEATURES, CLASSES))
  logits = values if is_linear else 4 * np.abs(values - values.mean(0)) + np.sin(3 * values)
  return features, logits + rng.normal(size=(ROWS, 1))  # Softmax ignores the last term.


def apply(head, features):
  params = jax.tree.map(np.float32, head.params)
  network = network_of(params, jax.lax.Precision.HIGHEST)
  return np.asarray(network.apply({'params': params}, np.float32(features)))


def centred(values):
  return values - values.mean(1, keepdims=True)


def ridge(columns, y):
  """Least squares with rows of the penalty added; values on the same columns."""
  z, mean = columns - columns.mean(0), y.mean(0)
  penalty = np.sqrt(1e-4 * np.square(z).sum(0).mean()) * np.eye(z.shape[1])
  targets = np.concatenate([y - mean, np.zeros((len(penalty), y.shape[1]))])
  return z @ np.linalg.lstsq(np.concatenate([z, penalty]), targets, rcond=None)[0] + mean


def hidden(head, features):
  first = head.params['Dense_0']
  return np.maximum(features @ first['kernel'].astype(float) + first['bias'], 0)


def error(head, data):
  features, logits = data
  return np.square(apply(head, features) - centred(logits)).mean()


@pytest.mark.parametrize('width', [None, 2 * CLASSES, 17])
def test_ridge_is_the_penalized_linear_map_at_any_width(width):
  features, logits = draw()
  head = fit_head('ridge', features, logits, width, KEY)
  assert head.num_terms == 0
  assert head.params['Dense_0']['bias'].shape == (CLASSES if width is None else width,)
  assert len(head.params) == (1 if width is None else 2)
  np.testing.assert_allclose(
      apply(head, features), ridge(features, centred(logits)), rtol=1e-5, atol=1e-5)


def test_a_linear_map_is_recovered():
  data = draw(is_linear=True)
  for kind in ('ridge', 'spline'):
    assert error(fit_head(kind, *data, 9, KEY), data) < 1e-5 * centred(data[1]).var()


@pytest.mark.parametrize('kind', ['random_features', 'spline'])
def test_the_read_out_is_ridge_on_the_hidden_layer(kind):
  features, logits = draw()
  head = fit_head(kind, features, logits, 15, KEY)
  assert [layer['kernel'].shape for layer in head.params.values()] == [(6, 15), (15, CLASSES)]
  columns = hidden(head, features)
  if kind == 'spline':  # The features themselves, and units of one feature.
    first = head.params['Dense_0']['kernel'][:, :head.num_terms]
    assert ((first != 0).sum(0) == 1).all()
    columns = np.concatenate([features, columns[:, :head.num_terms] / np.abs(first).sum(0)], 1)
  assert head.num_terms == {'random_features': 15, 'spline': 15 - 2 * CLASSES}[kind]
  expected = ridge(columns, centred(logits))
  # Units are rescaled, each by another power of two, so that only the values are nearly the same.
  tolerance = 0.02 if kind == 'random_features' else 1e-4
  np.testing.assert_allclose(apply(head, features), expected, atol=tolerance * expected.std())


def test_hinges_and_random_units_fit_a_bent_function_on_fresh_rows():
  features, _ = draw()
  bent = np.stack([np.abs(features[:, 0] - 0.6), np.maximum(features[:, 1] - 1, 0),
                   features[:, 2] - np.abs(features[:, 3] - 0.9)], 1)
  train, test = ((features[rows], bent[rows]) for rows in (slice(200), slice(200, None)))
  errors = {kind: error(fit_head(kind, *train, 30, KEY), test) for kind in KINDS}
  assert errors['spline'] < 0.1 * errors['random_features'] < 0.1 * errors['ridge']


@pytest.mark.parametrize('kind', ['ridge', 'spline'])
def test_further_units_do_not_change_the_function(kind):
  features, logits = draw()
  if kind == 'spline':  # So few hinges are useful that the rest of the units is random.
    logits = np.stack([np.maximum(features[:, 0] - 0.4, 0), features[:, 1], features[:, 2]], 1)
  head = fit_head(kind, features, logits, 29, KEY)
  used = 2 * CLASSES + head.num_terms
  assert used < 29
  first, last = head.params['Dense_0'], head.params['Dense_1']
  assert not last['kernel'][used:].any()
  assert np.abs(first['kernel'][:, used:]).min() > 0
  cut = {'Dense_0': {name: leaf[..., :used] for name, leaf in first.items()},
         'Dense_1': last | {'kernel': last['kernel'][:used]}}
  np.testing.assert_allclose(
      apply(head._replace(params=cut), features), apply(head, features), rtol=1e-6, atol=1e-6)


def test_a_feature_that_hardly_varies_has_no_large_weights():
  """It would multiply rounding, and images on which it does vary."""
  features, logits = draw()
  for kind in KINDS:
    head = fit_head(kind, features, logits, 20, KEY)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(head.params)) < 1e3


def test_the_mean_over_classes_is_kept_on_request():
  features, logits = draw(is_linear=True)
  for is_centred in (True, False):
    head = fit_head('ridge', features, logits, None, KEY, is_centred=is_centred)
    means = apply(head, features).mean(1)
    assert (np.abs(means).max() < 1e-4) == is_centred
    if not is_centred:
      np.testing.assert_allclose(apply(head, features), ridge(features, logits), atol=1e-4)


def test_keys_draw_other_units():
  features, logits = draw()
  one, same, other = (fit_head('random_features', features, logits, 8, jax.random.key(seed))
                      for seed in (0, 0, 1))
  assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(same)))
  assert not np.array_equal(one.params['Dense_0']['kernel'], other.params['Dense_0']['kernel'])


@pytest.mark.parametrize(('kind', 'changes', 'message'), [
    ('splines', {}, r"Unknown head_init 'splines'\. Did you mean 'spline'"),
    ('spline', {'width': None}, "width is None, .*'spline' needs a hidden layer"),
    ('random_features', {'width': None}, "width is None, .*'random_features' needs"),
    ('spline', {'width': 5}, 'width is 5, must be at least 6'),
    ('ridge', {'width': 5}, 'width is 5, must be at least 6'),
    ('spline', {'rows': 13}, 'features has 13 rows, must have more than the 13 terms'),
    ('ridge', {'rows': 7}, 'features has 7 rows, must have more than the 7 terms'),
    ('random_features', {'rows': 12}, 'features has 12 rows, must have more than the 13 terms'),
    ('ridge', {'logits': np.zeros((ROWS, 1))}, r'logits has shape \(301, 1\), .* 2 classes'),
    ('ridge', {'logits': np.full((ROWS, 3), np.nan)}, 'logits has a value in row 0 that is not'),
    ('ridge', {'logits': np.zeros((4, 3))}, r'features has shape \(301, 6\) and logits \(4, 3\)'),
])
def test_wrong_input_is_named(kind, changes, message):
  features, logits = draw()
  rows = changes.get('rows', ROWS)
  with pytest.raises(ValueError, match=rf'\A(?!.*\n).*{message}'):
    fit_head(kind, features[:rows], changes.get('logits', logits)[:rows],
             changes.get('width', 12), KEY)


def test_terms_and_widths_of_each_kind():
  assert max_terms('ridge', None, 6, 3) == max_terms('ridge', 40, 6, 3) == 7
  assert max_terms('random_features', 40, 6, 3) == 41
  assert max_terms('spline', 40, 6, 3) == 41
  check_width('random_features', 1, 10)
  check_width('ridge', 20, 10)
  with pytest.raises(ValueError, match=r'student\.head_width is 19, must be at least 20'):
    check_width('spline', 19, 10, 'student.head_width')
