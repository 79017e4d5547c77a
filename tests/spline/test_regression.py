"""Tables from CSV files, and the models that are compared on them."""

import importlib.util

import numpy as np
import pytest
import safetensors.numpy
import toy_runs

from dfkd_jax.spline import regression
from dfkd_jax.spline.__main__ import main
from dfkd_jax.spline.network import hinge_mask
from dfkd_jax.spline.tabular import Table, diabetes, read_csv

HAS = {name: importlib.util.find_spec(name) is not None for name in ('sklearn', 'matplotlib')}


def draw(rows=300):
  """A bent function of features in other units, and one that does not matter."""
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (rows, 3)) * [50, 0.1, 1] + [1000, 0, 3]
  y = 40 * np.abs(x[:, 0] - 1010) + 3000 * x[:, 1] + rng.normal(size=rows) + 5e4
  return Table(x, y, ('length', 'width', 'age'), 'price')


def write(path, table, delimiter=',', header=True, word=False):
  names = [*table.features, *(['sex'] * word), table.target]
  rows = [[*map(repr, map(float, x)), *(['F'] * word), repr(float(y))]
          for x, y in zip(table.x, table.y, strict=True)]
  lines = [delimiter.join(row) for row in ([names] if header else []) + rows]
  path.write_text('\n'.join(lines) + '\n')
  return path


@pytest.mark.parametrize('delimiter', [',', ';', '\t'])
def test_tables_are_read_back(tmp_path, delimiter):
  table = draw(4)
  for found in (
      read_csv(write(tmp_path / 'a.csv', table, delimiter)),
      read_csv(write(tmp_path / 'b.csv', table, delimiter, word=True), 'price', drop=['sex']),
      read_csv(write(tmp_path / 'c.csv', table, delimiter, header=False),
               names=['length', 'width', 'age', 'price'])):
    np.testing.assert_array_equal(found.x, table.x)
    np.testing.assert_array_equal(found.y, table.y)
    assert found[2:] == table[2:]
  other = read_csv(tmp_path / 'a.csv', 'width')
  assert other[2:] == (('length', 'age', 'price'), 'width')
  np.testing.assert_array_equal(other.x, np.stack([*table.x[:, [0, 2]].T, table.y], 1))


def test_quoted_names_and_empty_lines_are_read(tmp_path):
  (tmp_path / 'wine.csv').write_text('"fixed acidity";"quality"\n7.4;5\n\n7.8;6\n')
  table = read_csv(tmp_path / 'wine.csv')
  assert table.features == ('fixed acidity',)
  np.testing.assert_array_equal(table.x, [[7.4], [7.8]])


@pytest.mark.parametrize(('text', 'flags', 'message'), [
    ('a,b\n1,2\nM,4\n', [], "'a' has 'M' in line 3"),
    ('a,b\n1,2\n2,nan\n', [], "'b' has 'nan' in line 3"),
    ('a,b\n1,2\n2,\n', [], "'b' has '' in line 3"),
    ('a,b\n1,7\n2,7\n', [], "'b' is 7 in all rows"),
    ('a,b\n1,2\n3\n', [], 'Line 3 has 1 values, must have 2'),
    ('a,b\n', [], 'no rows'),
    ('', [], 'no rows'),
    ('length,b\n1,2\n', ['--target=lenght'], "'lenght'. Did you mean 'length'"),
    ('a,b\n1,2\n', ['--drop=c'], "column 'c'"),
    ('a,b\n1,2\n', ['--drop=a'], 'drop is a, must leave'),
    ('a,b\n' + '1,2\n2,3\n' * 13, [], 'has 20 rows, must have more than its 21 terms'),
    ('a,b\n' + '1,2\n2,3\n' * 20, ['--max_terms=0'], 'max_terms is 0'),
    ('a,b\n1,2\n', ['--steps=many'], "'many'"),
    (None, [], 'data.csv'),
])
def test_bad_tables_cost_one_line(tmp_path, monkeypatch, capsys, text, flags, message):
  monkeypatch.chdir(tmp_path)
  if text is not None:
    (tmp_path / 'data.csv').write_text(text)
  assert main(['data.csv', *flags]) == 2
  output = capsys.readouterr()
  assert not output.out
  line, = output.err.splitlines()
  assert line.startswith('error: ')
  assert message in line


@pytest.fixture(scope='module')
def comparison():
  return regression.compare(draw(), max_terms=9, num_steps=300)


def test_a_bent_function_is_fitted_and_tuned(comparison):
  errors, table = comparison.errors, draw()
  assert sorted([*comparison.train_rows, *comparison.test_rows]) == list(range(300))
  assert len(comparison.test_rows) == 60
  assert errors['mean'] == pytest.approx(table.y[comparison.test_rows].std(), rel=0.1)
  assert errors['spline'] < 0.2 * errors['linear'] < 0.2 * errors['mean']
  assert errors['network of the spline'] == pytest.approx(errors['spline'], rel=1e-2)
  assert errors['fine-tuned'] < errors['spline']
  predicted = regression.predict(comparison.tuned, table.x[comparison.test_rows])[:, 0]
  difference = predicted - table.y[comparison.test_rows]
  assert np.sqrt(np.square(difference).mean()) == pytest.approx(errors['fine-tuned'], rel=1e-6)


def test_tuning_begins_at_the_spline_and_sparse_tuning_keeps_hinges(comparison):
  table = draw()
  x, y = table.x[comparison.train_rows], table.y[comparison.train_rows, None]
  before, kernel = hinge_mask(comparison.network), comparison.tuned['Dense_0']['kernel']
  np.testing.assert_array_equal(kernel != 0, before['Dense_0']['kernel'])
  same = regression.fine_tune(comparison.network, x, y, num_steps=0)
  np.testing.assert_allclose(
      regression.predict(same, x), regression.predict(comparison.network, x), rtol=1e-5)
  dense = regression.fine_tune(comparison.network, x, y, num_steps=30)
  assert (dense['Dense_0']['kernel'] != 0).all()
  loss = lambda params: np.square(regression.predict(params, x) - y).mean()
  assert loss(comparison.tuned) < loss(comparison.network)
  assert loss(dense) < loss(comparison.network)


def test_the_command_prints_and_writes(tmp_path, capsys):
  path, folder = write(tmp_path / 'data.csv', draw(), word=True), tmp_path / 'runs/data'
  assert main([str(path), '--target=price', '--drop=sex', '--max_terms=9', '--steps=20',
               f'--folder={folder}']) == 0
  printed = capsys.readouterr().out
  assert '300 rows of 3 features; 240 to fit, 60 to test' in printed
  assert 'max(0, length - 10' in printed
  errors = dict(line.strip('| ').split(' | ') for line in printed.splitlines()
                if line.startswith('| ') and 'model' not in line)
  assert float(errors['spline']) < float(errors['linear'])
  arrays = safetensors.numpy.load_file(folder / 'network.safetensors')
  layers = {f'Dense_{i}': {name: arrays[f'params.Dense_{i}.{name}'] for name in ('kernel', 'bias')}
            for i in range(2)}
  values = regression.predict(layers, draw().x)[:, 0]
  assert np.square(values - draw().y).mean() < 0.05 * draw().y.var()
  assert (folder / 'effects.png').exists() == HAS['matplotlib']


def test_a_config_has_values_for_flags_and_the_command_line_comes_first(
    tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(toy_runs.ROOT)
  rows = np.random.default_rng(0).uniform(1, 9, (60, 8)).round(3)
  path = tmp_path / 'abalone.data'
  path.write_text(''.join(f'M,{",".join(map(str, row))}\n' for row in rows))
  command = [str(path), '--config=configs/regression.py:abalone', '--steps=0', '--max_terms=5']
  assert main(command) == 0
  assert '60 rows of 7 features' in (printed := capsys.readouterr().out)
  assert 'root mean squared error of rings' in printed
  assert main([*command, '--target=length']) == 0
  assert 'root mean squared error of length' in capsys.readouterr().out
  for config, message in (('configs/regression.py:abelone', "Did you mean 'abalone'"),
                          ('configs/none.py', 'must be a Python file'),
                          ('configs/default.py', "flag in --config 'augment'")):
    assert main([str(path), f'--config={config}']) == 2
    line, = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_default_data_are_real():
  if not HAS['sklearn']:
    with pytest.raises(ImportError, match=r'\A(?!.*\n).*dfkd_jax\[sklearn\]'):
      diabetes()
    return
  table = diabetes()
  assert table.x.shape == (442, 10)
  assert (table.y.min(), table.y.max()) == (25, 346)
  assert table.features[:3] == ('age', 'sex', 'bmi')
