"""The notebooks run: their own code, with fewer calls."""

import json
import pathlib

import pytest

COLABS = pathlib.Path(__file__).resolve().parent.parent / 'colabs'


SMALLER = {  # What a notebook has, what the test has, and what it prints twice.
    'quickstart': ('num_calls, batch_size = 40, 128', 'num_calls, batch_size = 12, 16', 'top1'),
    'segmentation': ('num_epochs, num_calls, batch_size = 20, 40, 16',
                     'num_epochs, num_calls, batch_size = 4, 10, 16', "'mean_iou':")}


@pytest.mark.parametrize('path', sorted(COLABS.glob('*.ipynb')), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  cells = json.loads(path.read_text())['cells']
  assert all(cell.get('outputs', []) == [] for cell in cells), (
      'Clear the outputs before committing.')
  source = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
  whole, smaller, printed = SMALLER[path.stem]
  assert whole in source
  exec(compile(source.replace(whole, smaller), str(path), 'exec'), {})
  assert (tmp_path / 'images.png').exists()
  assert capsys.readouterr().out.count(printed) == 2
