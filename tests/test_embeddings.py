"""Files of class embeddings: what is read, and one line for everything else."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from dfkd_jax import embeddings

GIVEN = np.random.default_rng(0).normal(size=(5, 3))


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64', 'int8'])
def test_both_formats_and_all_kinds_of_numbers(tmp_path, dtype):
  given = (10 * GIVEN).astype(dtype)
  np.save(tmp_path / 'given.npy', given)
  save_file({'text': given}, tmp_path / 'given.safetensors')
  for name in ('given.npy', 'given.safetensors'):
    found = embeddings.load(tmp_path / name, 5)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, given.astype(np.float32))


def write(path, kind):
  """A file with which something is wrong."""
  arrays = {
      'classes': GIVEN[:4], 'axes': GIVEN.ravel(), 'width': GIVEN[:, :0], 'constant': np.ones((5, 3)),
      'nan': np.where(GIVEN > 1, np.nan, GIVEN), 'words': np.full((5, 3), 'coat'), 'yes or no': GIVEN > 0,
      'complex': GIVEN + 1j}
  if kind == 'objects':  # Whose loading would run what is in the file.
    np.save(path, np.array([[print]] * 5), allow_pickle=True)
  elif kind == 'text':
    path.write_text('0.1 0.2\n')
  elif kind == 'truncated':
    np.save(path, GIVEN)
    path.write_bytes(path.read_bytes()[:-7])
  elif kind == 'folder':
    path.mkdir()
  elif kind != 'missing':
    np.save(path, arrays[kind])


@pytest.mark.parametrize(('kind', 'message'), {
    'classes': r'\(4, 3\), must be \(5, E\)', 'axes': r'\(15,\), must be \(5, E\)', 'width': r'\(5, 0\), must be',
    'constant': 'the same for all classes', 'nan': 'not finite', 'words': 'type <U4', 'yes or no': 'type bool',
    'complex': 'type complex128', 'objects': 'must be .npy or .safetensors', 'text': 'must be .npy or .safetensors',
    'truncated': 'must be .npy or .safetensors', 'folder': 'cannot be read', 'missing': 'cannot be read'}.items())
def test_bad_files_cost_one_line(tmp_path, kind, message):
  write(tmp_path / 'given.npy', kind)
  with pytest.raises(ValueError, match=message) as error:
    embeddings.load(tmp_path / 'given.npy', 5)
  assert 'given.npy' in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('length', [0, 4, 8, 20, 80, -1])
def test_truncated_safetensors(tmp_path, length):
  path = tmp_path / 'given.safetensors'
  save_file({'text': GIVEN}, path)
  path.write_bytes(path.read_bytes()[:length])
  with pytest.raises(ValueError, match=r'must be \.npy or \.safetensors'):
    embeddings.load(path, 5)


def test_safetensors_of_several_arrays(tmp_path):
  save_file({'text': GIVEN, 'image': GIVEN}, tmp_path / 'given.safetensors')
  with pytest.raises(ValueError, match='it has 2 tensors'):
    embeddings.load(tmp_path / 'given.safetensors', 5)
