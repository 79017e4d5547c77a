"""The notebooks run: their own code, with fewer calls."""

import json
import pathlib

import pytest
import toy_runs

COLABS = pathlib.Path(__file__).resolve().parent.parent / 'colabs'


SMALLER = {  # Pairs of texts of a notebook and of the test, and what it prints twice.
    'quickstart': ({'num_calls, batch_size = 40, 128': 'num_calls, batch_size = 3, 8'}, 'top1'),
    'segmentation': ({
        'num_epochs, num_calls, batch_size = 20, 40, 16':
            'num_epochs, num_calls, batch_size = 1, 2, 8',
        'p=1, q=2, widths=(16, 30, 60)': 'p=0, q=0, widths=(4, 5, 5)',
        'p=0, q=1, widths=(8, 20, 20)': 'p=0, q=0, widths=(3, 4, 4)'}, "'mean_iou':")}


@pytest.fixture(autouse=True, scope='module')
def _quick():
  with toy_runs.quick():
    yield


@pytest.mark.parametrize('path', sorted(COLABS.glob('*.ipynb')), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  cells = json.loads(path.read_text())['cells']
  assert all(cell.get('outputs', []) == [] for cell in cells), (
      'Clear the outputs before committing.')
  source = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
  changes, printed = SMALLER[path.stem]
  for whole, smaller in changes.items():
    assert whole in source
    source = source.replace(whole, smaller)
  exec(compile(source, str(path), 'exec'), {})
  assert (tmp_path / 'images.png').exists()
  assert capsys.readouterr().out.count(printed) == 2
