"""Tables of numbers to fit: from a CSV file, or one that scikit-learn ships."""

import csv
import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dfkd_jax.messages import check_choice, short_repr


class Table(NamedTuple):
  """Features, a target, and their names."""

  x: np.ndarray  # [N, d] float64
  y: np.ndarray  # [N] float64
  features: tuple[str, ...]  # d
  target: str


def read_csv(path: str | os.PathLike[str], target: str | None = None, *,
             names: Sequence[str] | None = None, drop: Sequence[str] = ()) -> Table:
  """Reads a file of numbers, separated by commas, semicolons or tabs.

  Args:
    path: The file, in UTF-8.
    target: Column to predict; None: the last one.
    names: Names of the columns, if the first line has values instead of names.
    drop: Columns to leave out, such as those with words.

  Raises:
    ValueError: There is no such column, a row has another number of values, or a value is not a
      finite number. Also if the target is constant.
    OSError: The file cannot be read.
  """
  lines = pathlib.Path(path).read_text('utf-8-sig').splitlines()
  first = lines[0] if lines else ''
  reader = csv.reader(lines, delimiter=max(',;\t', key=first.count))
  rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
  if names is None:
    names = rows.pop(0)[1] if rows else []
  if not rows:
    raise ValueError(f'{path} has no rows of values.')
  for line, row in rows:
    if len(row) != len(names):
      raise ValueError(f'Line {line} has {len(row)} values, must have {len(names)}.')
  target = names[-1] if target is None else target
  for name in (target, *drop):
    check_choice(name, names, 'column')
  columns = {name: _numbers(name, [(line, row[i]) for line, row in rows])
             for i, name in enumerate(names) if name not in drop}
  y = columns.pop(target, None)
  if y is None or not columns:
    raise ValueError(f'drop is {", ".join(drop)}, must leave the target and another column.')
  if np.ptp(y) == 0:
    raise ValueError(f'Column {target!r} is {y[0]:g} in all rows: there is nothing to fit.')
  return Table(np.stack(list(columns.values()), 1), y, tuple(columns), target)


def _numbers(name, cells):
  """Converts the cells [(line, text), ...] of a column to numbers [N]."""
  values = np.empty(len(cells))
  for i, (line, cell) in enumerate(cells):
    try:
      values[i] = float(cell)
    except ValueError:
      values[i] = math.nan
    if not math.isfinite(values[i]):
      raise ValueError(f'Column {name!r} has {short_repr(cell)} in line {line}, must be a finite '
                       'number: fill it, or drop the column.')
  return values


def diabetes() -> Table:
  """Loads the 442 patients of Efron et al. (2004) that scikit-learn, an extra, ships."""
  try:
    from sklearn.datasets import load_diabetes
  except ImportError:
    raise ImportError("The default data need scikit-learn: pip install 'dfkd_jax[sklearn]'."
                      ) from None
  data = load_diabetes(scaled=False)
  return Table(data.data, data.target, tuple(data.feature_names), 'progression')
