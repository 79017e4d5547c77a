"""Fits of hinges, compared with least squares, brute force, and functions that are known."""

import itertools

import numpy as np
import pytest

from dfkd_jax.spline import candidates, format_terms, hinge_fit, selection


def draw(seed, rows=300, features=3, responses=2):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(rows, features)) * [2.0, 0.5, 1.0, 3.0, 1.0][:features]
  hidden = np.maximum(x @ rng.normal(size=(features, 5)) + rng.normal(size=5), 0)
  return x, hidden @ rng.normal(size=(5, responses)) + 0.1 * rng.normal(size=(rows, responses))


def rss(columns, y):
  fitted = columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
  return np.square(y - fitted).sum()


def standardized(x):
  return (x - x.mean(0)) / x.std(0)


@pytest.mark.parametrize('seed', range(3))
def test_gains_are_those_of_least_squares_in_each_step(seed):
  """Also the choice: brute force over all candidates finds no better one."""
  x, y = draw(seed)
  z = standardized(x)
  places = candidates.choose_knots(z, 7, None, None)
  group, columns = candidates.Additive(z, y, places), np.zeros((len(z), 0))
  basis = np.ones((len(z), 1))
  residual, terms = y, []
  for _ in range(5):
    new = basis[:, columns.shape[1]:]
    for column in new.T:
      for _ in range(2):
        column = column - columns @ (columns.T @ column)
      q = column / np.linalg.norm(column)
      group.update(q, q @ residual)
      residual = residual - np.outer(q, q @ residual)
      columns = np.concatenate([columns, q[:, None]], 1)
    gains = group.gains(9)
    before = rss(basis, y)
    for v, k in itertools.product(range(3), range(7)):
      if not group.is_free[v, k]:
        assert gains[v, k] == -np.inf
        continue
      hinge = np.maximum(z[:, v] - places.knot[v, k], 0)
      both = np.stack([hinge, np.maximum(places.knot[v, k] - z[:, v], 0)], 1)
      np.testing.assert_allclose(
          gains[v, k], before - rss(np.concatenate([basis, both], 1), y), rtol=1e-8, atol=1e-8)
    new = group.take(gains.argmax())
    is_first = not any(term[0].feature == new[0][0].feature for term in terms)
    assert len(new) == (2 if is_first else 1)
    terms += new
    basis = np.concatenate([basis, selection.term_columns(z, new)], 1)


@pytest.mark.parametrize('is_linear_first', [False, True])
def test_the_greedy_path_is_that_of_brute_force(is_linear_first):
  x, y = draw(7)
  z, start = standardized(x), np.ones((300, 1))
  start = np.concatenate([start, z], 1) if is_linear_first else start
  places = candidates.choose_knots(z, 6, None, None)
  terms = selection.select_terms(z, y, start, places, 10, 0.0, False)
  basis, expected, free = start, [], set(itertools.product(range(3), range(6)))
  while len(expected) < len(terms):
    hinges = lambda v, k: np.stack([np.maximum(sign * (z[:, v] - places.knot[v, k]), 0)
                                    for sign in (1, -1)], 1)
    left = {(v, k): rss(np.concatenate([basis, hinges(v, k)], 1), y) for v, k in free}
    v, k = min(left, key=left.get)
    free.remove((v, k))
    known = np.concatenate([basis, z[:, v:v + 1]], 1)
    is_known = np.linalg.matrix_rank(known) == np.linalg.matrix_rank(basis)
    expected += [(v, sign, places.knot[v, k]) for sign in ((1,) if is_known else (1, -1))]
    basis = np.concatenate([basis, hinges(v, k)], 1)
  assert [tuple(term[0]) for term in terms] == expected


def test_a_feature_of_two_values_adds_itself():
  rng = np.random.default_rng(0)
  x = np.stack([rng.integers(1, 3, 400), rng.normal(size=400)], 1).astype(float)
  y = 5 * x[:, 0] + np.abs(x[:, 1]) + 0.1 * rng.normal(size=400)
  model = hinge_fit(x, y)
  assert list(model.feature[:, 0]).count(0) == 1
  assert np.sqrt(np.square(model.predict(x)[:, 0] - y).mean()) < 0.12
  alone = hinge_fit(x[:, :1], x[:, 0])
  assert alone.num_terms == 1
  np.testing.assert_allclose(alone.predict(x[:, :1])[:, 0], x[:, 0], atol=1e-9)


def test_the_first_knot_of_a_feature_has_two_hinges_and_later_ones_have_one():
  x = np.random.default_rng(0).uniform(-1, 1, (500, 1))
  model = hinge_fit(x, np.sin(5 * x), max_terms=9, prune=False, threshold=0)
  assert model.num_terms == 8
  assert (model.slope[:, 0] == [1, -1, 1, 1, 1, 1, 1, 1]).all()
  assert np.linalg.matrix_rank(np.concatenate([np.ones((500, 1)), model.basis(x)], 1)) == 9


def test_the_cost_of_a_deletion_is_that_of_a_refit():
  x, y = draw(4)
  z, start = standardized(x), np.ones((300, 1))
  places = candidates.choose_knots(z, 9, None, None)
  terms = selection.select_terms(z, y, start, places, 8, 0.0, False)
  basis = selection.term_columns(z, terms)
  whole = np.arange(len(terms))
  for count in range(len(terms) - 1, -1, -1):
    kept = selection.prune_terms(start, basis, y, terms, 2.0, count)
    costs = {drop: rss(np.concatenate([start, basis[:, whole[whole != drop]]], 1), y)
             for drop in whole}
    assert list(kept) == [i for i in whole if i != min(costs, key=costs.get)]
    whole = np.array(kept, int)


@pytest.mark.parametrize('seed', range(3))
def test_a_known_function_is_found_under_noise(seed):
  rng = np.random.default_rng(seed + 5)
  truth = lambda x: np.abs(x[:, 0]) + np.maximum(x[:, 1] - 0.3, 0)
  x, fresh = rng.uniform(-1, 1, (2000, 2)), rng.uniform(-1, 1, (5000, 2))
  model = hinge_fit(x, truth(x) + 0.1 * rng.normal(size=2000))
  assert model.num_terms == 3
  assert sorted(model.feature[:, 0]) == [0, 0, 1]
  assert np.sqrt(np.square(model.predict(fresh)[:, 0] - truth(fresh)).mean()) < 0.01


def test_coefficients_stay_bounded():
  for seed in range(20):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (400, 2))
    y = np.abs(x[:, 0]) + np.maximum(x[:, 1] - 0.3, 0) + 0.1 * rng.normal(size=400)
    assert np.abs(hinge_fit(x, y, prune=False, threshold=0).coefficient).max() < 1e3


@pytest.mark.parametrize('options', [{}, {'linear_first': True}, {'projection': 2},
                                     {'interactions': 'min', 'num_knots': 6}])
def test_scale_and_shift_of_a_feature_do_not_matter(options):
  x, y = draw(1)
  moved = x * [10.0, 0.1, 3.0] + [5.0, -3.0, 100.0]
  if 'projection' in options:  # Directions of a linear fit depend on the units.
    moved = x * 7.0 + 2.0
  fitted, again = hinge_fit(x, y, **options), hinge_fit(moved, y, **options)
  np.testing.assert_allclose(fitted.predict(x), again.predict(moved), rtol=1e-6, atol=1e-7)


def test_constant_duplicate_and_tied_columns_change_nothing():
  x, y = draw(2)
  more = np.concatenate([x, np.full((len(x), 1), 7.0), x[:, :1]], 1)
  again = hinge_fit(more, y, minspan=1, endspan=11)
  fitted = hinge_fit(x, y, minspan=1, endspan=11)
  assert set(again.feature.ravel()) <= {0, 1, 2, 4}
  np.testing.assert_allclose(fitted.predict(x), again.predict(more), atol=1e-6)
  assert np.abs(again.coefficient).max() < 1e3
  tied = np.round(x)
  model = hinge_fit(tied, y)
  assert set(model.knot.ravel()) <= set(tied.ravel())
  assert np.isfinite(model.predict(tied)).all()


@pytest.mark.parametrize('value', [0.1, 7.0])
def test_a_constant_column_has_no_slope_in_the_linear_part(value):
  x, y = draw(2)
  model = hinge_fit(np.concatenate([x, np.full((len(x), 1), value)], 1), y, linear_first=True)
  np.testing.assert_allclose(model.linear[3], 0, atol=1e-9)
  assert np.abs(model.intercept).max() < 1e3


def test_responses_share_one_basis():
  x, y = draw(3, responses=1)
  one, two = hinge_fit(x, y[:, 0]), hinge_fit(x, np.concatenate([y, y], 1))
  np.testing.assert_array_equal(one.feature, two.feature)
  np.testing.assert_array_equal(one.knot, two.knot)
  np.testing.assert_allclose(two.coefficient, one.coefficient.repeat(2, 1), atol=1e-9)


def test_a_constant_response_is_an_intercept():
  model = hinge_fit(draw(0)[0], np.full(300, 2.5))
  assert model.num_terms == 0
  np.testing.assert_allclose(model.predict(np.zeros((4, 3))), 2.5)
  assert model.basis(np.zeros((4, 3))).shape == (4, 0)


def test_a_linear_response_takes_no_hinge_once_the_fit_starts_linear():
  x, _ = draw(0)
  model = hinge_fit(x, x @ [[1.0, 2.0], [0.0, -3.0], [0.5, 0.0]] + [1.0, 2.0], linear_first=True)
  assert model.num_terms == 0
  np.testing.assert_allclose(model.linear, [[1, 2], [0, -3], [0.5, 0]], atol=1e-9)
  np.testing.assert_allclose(model.intercept, [1, 2], atol=1e-9)


def test_keeping_terms_follows_the_order_of_the_pruning():
  x, y = draw(6)
  whole = hinge_fit(x, y, threshold=0, prune=False, max_terms=12)
  hinges = lambda model: set(zip(model.feature[:, 0], model.slope[:, 0], model.knot[:, 0],
                                 strict=True))
  previous = hinges(whole)
  for count in (9, 6, 2):
    model = hinge_fit(x, y, threshold=0, keep=count, max_terms=12)
    assert model.num_terms == count
    assert hinges(model) < previous
    previous = hinges(model)


def test_interactions_find_the_smaller_of_two_hinges():
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (600, 3))
  y = 3 * np.minimum(np.maximum(x[:, 0], 0), np.maximum(0.2 - x[:, 1], 0)) + x[:, 2]
  error = lambda model: np.sqrt(np.square(model.predict(x)[:, 0] - y).mean())
  model = hinge_fit(x, y, interactions='min', num_knots=20)
  assert error(model) < 0.02 < 0.2 < error(hinge_fit(x, y, num_knots=20))
  assert 'min(' in format_terms(model)


def test_gains_of_interactions_are_those_of_least_squares():
  x, y = draw(5)
  z = standardized(x)
  places = candidates.choose_knots(z, 4, None, None)
  parent = candidates.Hinge(1, -1, places.knot[1, 2])
  basis = np.concatenate([np.ones((300, 1)), selection.term_columns(z, [(parent,)])], 1)
  columns = np.linalg.qr(basis)[0]
  group = candidates.Interactions(z, parent, columns, y - columns @ (columns.T @ y), places)
  for wave in (1.0, 2.0):  # Also after columns that come later.
    gains, terms = group.gains(1), []
    for index in range(len(gains)):
      terms += group.take(index)
      column = selection.term_columns(z, terms[-1:])
      assert (group.sign[index], group.feature[index] != 1) == (terms[-1][1].sign, True)
      np.testing.assert_allclose(
          gains[index], rss(basis, y) - rss(np.concatenate([basis, column], 1), y), rtol=1e-8)
    assert len(set(terms)) == 2 * 2 * 4  # signs, other features, knots
    assert group.gains(0).max() == -np.inf
    group.is_free[:] = True
    column = np.sin(wave * z[:, 0])
    basis = np.concatenate([basis, column[:, None]], 1)
    q = column - columns @ (columns.T @ column)
    q /= np.linalg.norm(q)
    group.update(q, q @ y)
    columns = np.concatenate([columns, q[:, None]], 1)


@pytest.mark.parametrize('penalty', [0.5, 2.0, 9.0])
def test_pruning_keeps_the_terms_of_the_least_score(penalty):
  """Generalized cross-validation, on the path of deletions; two hinges can share a knot."""
  x, y = draw(4)
  z, start = standardized(x), np.ones((300, 1))
  places = candidates.choose_knots(z, 9, None, None)
  terms = selection.select_terms(z, y, start, places, 12, 0.0, False)
  basis = selection.term_columns(z, terms)
  path = [selection.prune_terms(start, basis, y, terms, penalty, count)
          for count in range(len(terms) + 1)]
  scores = []
  for kept in path:
    knots = {(terms[i][0].feature, terms[i][0].knot) for i in kept}
    parameters = 1 + len(kept) + penalty * len(knots)
    scores.append(rss(np.concatenate([start, basis[:, kept]], 1), y) / (1 - parameters / 300)**2)
  kept = selection.prune_terms(start, basis, y, terms, penalty, None)
  assert kept == path[int(np.argmin(scores))]
  assert 0 < len(kept) <= len(terms)


def test_the_table_has_a_line_for_each_term():
  x, y = draw(0, responses=2)
  model = hinge_fit(x, y, linear_first=True)
  lines = format_terms(model, ['length', 'width', 'age'], ['price', 'risk']).splitlines()
  assert lines[0].split() == ['term', 'price', 'risk']
  assert len(lines) == 2 + 3 + model.num_terms
  assert lines[2].split()[0] == 'length'
  assert all('max(0, ' in line for line in lines[5:])


@pytest.mark.parametrize(('x', 'y', 'options', 'message'), [
    (np.zeros((1, 2)), np.zeros(1), {}, 'x has 1 rows, must have more than its 1 terms'),
    (np.zeros((3, 3)), np.zeros(3), {'linear_first': True}, 'x has 3 rows, must have more than'),
    ([[1.0], [np.nan]], [1.0, 2.0], {}, 'x has a value in row 1 that is not finite'),
    ([[1.0], [2.0]], [np.inf, 2.0], {}, 'y has a value in row 0 that is not finite'),
    ([['a'], ['b']], [1.0, 2.0], {}, 'x and y must be numbers'),
    (np.zeros((4, 2)), np.zeros(5), {}, r'x has shape \(4, 2\) and y \(5, 1\), must have'),
    (np.zeros((4, 2)), np.zeros(4), {'max_terms': 0}, 'max_terms is 0, must be at least 1'),
    (np.zeros((4, 2)), np.zeros(4), {'projection': 2}, 'projection is 2, must be from 1 to 1'),
    (np.zeros((4, 2)), np.zeros(4), {'minspan': 0}, 'minspan is 0, must be at least 1'),
    (np.zeros((4, 2)), np.zeros(4), {'interactions': 'product'}, "'product'"),
])
def test_wrong_input_is_named(x, y, options, message):
  with pytest.raises(ValueError, match=rf'\A(?!.*\n).*{message}'):
    hinge_fit(x, y, **options)
