"""Fits a spline to a CSV file, turns it into a network, and fine-tunes that.

python -m dfkd_jax.spline table.csv --target=rings --drop=sex --folder=runs/table
python -m dfkd_jax.spline abalone.data --config=configs/regression.py:abalone
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from dfkd_jax import cli
from dfkd_jax.messages import check_choice, one_line
from dfkd_jax.spline.model import format_terms
from dfkd_jax.spline.plot import plot_effects
from dfkd_jax.spline.regression import Comparison, compare
from dfkd_jax.spline.tabular import Table, diabetes, read_csv


class _Parser(argparse.ArgumentParser):
  """Raises where argparse would print its usage and exit."""

  def error(self, message: str) -> None:
    raise ValueError(f'{message}; see --help.')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = _Parser(prog='python -m dfkd_jax.spline', description=__doc__.splitlines()[0])
  add = parser.add_argument
  names = lambda text: [name.strip() for name in text.split(',')]
  add('data', nargs='?', help="CSV file of numbers; default: scikit-learn's diabetes")
  add('--config', help='file with values for other flags, such as configs/regression.py:abalone')
  add('--target', help='column to predict; default: the last one')
  add('--drop', type=names, default=[], help='columns to leave out: NAME,NAME')
  add('--names', type=names, help='names of all columns, if the file begins with values')
  add('--max_terms', type=int, default=21, help='most terms before the pruning')
  add('--steps', type=int, default=2000, help='steps of the fine-tuning')
  add('--learning_rate', type=float, default=1e-3)
  add('--dense', action='store_true', help='train all weights, not only those of the hinges')
  add('--seed', type=int, default=0, help='of the split into rows to fit and rows to test')
  add('--folder', type=pathlib.Path, help='where to write the network and the plot')
  try:
    flags = parser.parse_args(argv)
    if flags.config is not None:
      config = cli.load(flags.config)
      for name in config:
        check_choice(name, vars(flags), 'flag in --config')
      parser.set_defaults(**config)
      flags = parser.parse_args(argv)
    table = diabetes() if flags.data is None else read_csv(
        flags.data, flags.target, names=flags.names, drop=flags.drop)
    comparison = compare(
        table, max_terms=flags.max_terms, num_steps=flags.steps, seed=flags.seed,
        learning_rate=flags.learning_rate, is_sparse=not flags.dense)
    print(format_comparison(table, comparison))
    if flags.folder is not None:
      print('Wrote', *write(flags.folder, table, comparison))
  except (ValueError, OSError, ImportError) as error:
    print(f'error: {one_line(error)}', file=sys.stderr)
    return 2
  return 0


def format_comparison(table: Table, comparison: Comparison) -> str:
  """Formats the terms, and a Markdown table of the errors."""
  lines = [f'{len(table.x)} rows of {len(table.features)} features; '
           f'{len(comparison.train_rows)} to fit, {len(comparison.test_rows)} to test.', '',
           format_terms(comparison.model, table.features, [table.target]), '',
           f'| model | root mean squared error of {table.target} |', '|---|---|']
  lines += [f'| {name} | {error:.4g} |' for name, error in comparison.errors.items()]
  return '\n'.join(lines)


def write(folder: pathlib.Path, table: Table, comparison: Comparison) -> list[pathlib.Path]:
  """Writes the fine-tuned network, and the plot if matplotlib is installed; returns the paths."""
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / 'network.safetensors']
  params = jax.tree.map(np.float32, {'params': comparison.tuned})
  safetensors.numpy.save_file(traverse_util.flatten_dict(params, sep='.'), paths[0], {
      'features': json.dumps(table.features), 'target': table.target})
  if find_spec('matplotlib') and comparison.model.num_terms:
    paths.append(folder / 'effects.png')
    plot_effects(comparison.model, table.x, table.features, [table.target]).savefig(paths[1])
  return paths


if __name__ == '__main__':
  sys.exit(main())
