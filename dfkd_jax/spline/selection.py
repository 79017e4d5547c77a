"""Selects the terms of a fit: a forward pass over candidates, then a pruning."""

import numpy as np

from dfkd_jax.spline.candidates import TOLERANCE, Additive, Interactions, Knots, Term


def term_columns(z: np.ndarray, terms: list[Term]) -> np.ndarray:
  """Returns the values of terms at standardized features z [N, d], [N, H]."""
  columns = np.zeros((len(z), len(terms)))
  for i, term in enumerate(terms):
    columns[:, i] = np.min([np.maximum(sign * (z[:, v] - t), 0) for v, sign, t in term], 0)
  return columns


def select_terms(z: np.ndarray, y: np.ndarray, start: np.ndarray, places: Knots, max_terms: int,
                 threshold: float, interacts: bool) -> list[Term]:
  """Selects terms, one knot at a time, by the largest decrease of the squared residual.

  Args:
    z: [N, d] standardized features.
    y: [N, C] responses.
    start: [N, F] columns that the basis begins with, the intercept first.
    places: Candidate knots.
    max_terms: Most terms, and one for the intercept.
    threshold: Least share of the total sum of squares that a knot must explain.
    interacts: Whether a term may be the smaller one of two hinges.
  """
  residual, columns = y.copy(), np.zeros((len(z), 0))
  groups = [Additive(z, y, places)]
  total, terms = np.square(y - y.mean(0)).sum(), []

  def add(new):
    nonlocal residual, columns
    for column in new.T:
      norm = np.linalg.norm(column)
      for _ in range(2):  # Once leaves an error that grows with the number of columns.
        column = column - columns @ (columns.T @ column)
      length = np.linalg.norm(column)
      if length**2 <= TOLERANCE * norm**2:
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
    add(term_columns(z, new))
    if interacts and best == 0:
      groups += [Interactions(z, term[0], columns, residual, places) for term in new]
  return terms


def prune_terms(start: np.ndarray, basis: np.ndarray, y: np.ndarray, terms: list[Term],
                penalty: float, keep: int | None) -> list[int]:
  """Drops terms, the one of least effect first; returns the indices of the others.

  These are `keep` terms, or with None as many as have the least score of generalized
  cross-validation: RSS / (1 - P / N)^2, where P counts columns, and `penalty` for each knot
  (Friedman 1991, equation 30). Columns of `start` [N, F] stay, next to the `basis` [N, H] of all
  terms; y are the responses [N, C].
  """
  rows = len(y)
  # Columns of `start` that depend on others would make R singular.
  start = np.linalg.svd(start, full_matrices=False)
  start = start[0][:, start[1] > TOLERANCE**0.5 * start[1][0]]
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
