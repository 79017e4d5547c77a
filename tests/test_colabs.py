"""The notebooks run: their own code, with fewer calls and smaller networks."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
import toy_runs

COLABS = pathlib.Path(__file__).resolve().parent.parent / 'colabs'


@pytest.fixture(autouse=True, scope='module')
def _quick():
  with toy_runs.quick():
    yield


def run_notebook(name, changes, without=()):
  """Runs the code of a notebook with texts replaced, and without cells that have certain words."""
  path = COLABS / f'{name}.ipynb'
  cells = json.loads(path.read_text())['cells']
  assert all(cell.get('outputs', []) == [] for cell in cells), (
      'Clear the outputs before committing.')
  sources = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
  source = '\n'.join(text for text in sources if not any(word in text for word in without))
  for whole, smaller in changes.items():
    assert whole in source
    source = source.replace(whole, smaller)
  exec(compile(source, str(path), 'exec'), namespace := {})
  return namespace


def test_every_notebook_has_a_test():
  assert {path.stem for path in COLABS.glob('*.ipynb')} == {
      'quickstart', 'segmentation', 'spline'}


@pytest.mark.parametrize(('name', 'changes', 'printed'), [
    ('quickstart', {'num_calls, batch_size = 40, 128': 'num_calls, batch_size = 3, 8'}, 'top1'),
    ('segmentation', {
        'num_epochs, num_calls, batch_size = 20, 40, 16':
            'num_epochs, num_calls, batch_size = 1, 2, 8',
        'p=1, q=2, widths=(16, 30, 60)': 'p=0, q=0, widths=(4, 5, 5)',
        'p=0, q=1, widths=(8, 20, 20)': 'p=0, q=0, widths=(3, 4, 4)'}, "'mean_iou':")],
    ids=('quickstart', 'segmentation'))
def test_distillation(name, changes, printed, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  run_notebook(name, changes)
  assert (tmp_path / 'images.png').exists()
  assert capsys.readouterr().out.count(printed) == 2


def test_spline(tmp_path, monkeypatch, capsys):
  """With a CSV file, since scikit-learn is an extra, as is matplotlib."""
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(90, 3))
  rows = np.column_stack([x, np.abs(x[:, 0]) + x[:, 1] + 0.1 * rng.normal(size=90)])
  np.savetxt('data.csv', rows, delimiter=',', header='length,width,age,price', comments='')
  has_plot = importlib.util.find_spec('matplotlib') is not None
  namespace = run_notebook(
      'spline', {"path, target, drop, num_steps = None, None, [], 2000":
                 "path, target, drop, num_steps = 'data.csv', 'price', ['age'], 20"},
      without=() if has_plot else ('plot_effects',))
  assert (tmp_path / 'effects.png').exists() == has_plot
  printed = capsys.readouterr().out
  assert '90 rows of length width' in printed
  assert 'max(0, length - ' in printed
  errors = namespace['comparison'].errors
  assert errors['fine-tuned'] < errors['linear'] < errors['mean']
  assert f"{errors['fine-tuned']:.4g}" in printed
