"""Files of class embeddings: both formats, and one line for a bad file."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dfkd_jax import weights

GIVEN = np.random.default_rng(0).normal(size=(5, 3))


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64', 'int8', ml_dtypes.bfloat16])
def test_both_formats_and_all_kinds_of_numbers(tmp_path, dtype):
  given = (10 * GIVEN).astype(dtype)
  save_file({'text': given}, tmp_path / 'given.safetensors')
  names = ['given.safetensors']
  if isinstance(dtype, str):  # NumPy's own format knows no other.
    np.save(tmp_path / 'given.npy', given)
    names.append('given.npy')
  for name in names:
    found = weights.read_embeddings(tmp_path / name)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, given.astype(np.float32))


def write(path, kind):
  """Writes a bad file."""
  arrays = {'words': np.full((5, 3), 'coat'), 'complex': GIVEN + 1j}
  if kind == 'objects':  # Loading these would run code from the file.
    np.save(path, np.array([[print]] * 5), allow_pickle=True)
  elif kind == 'text':
    path.write_text('0.1 0.2')
  elif kind == 'folder':
    path.mkdir()
  elif kind != 'missing':
    np.save(path, arrays[kind])


@pytest.mark.parametrize(('kind', 'message'), {
    'words': 'must be one array of numbers: .*<U4', 'complex': 'numbers: .*complex128',
    'objects': 'must be one array of numbers: Object arrays cannot be loaded',
    'text': 'must be one array of numbers', 'folder': 'numbers: .*Is a directory',
    'missing': 'numbers: .*No such file'}.items())
def test_bad_files_cost_one_line(tmp_path, kind, message):
  write(tmp_path / 'given.npy', kind)
  with pytest.raises(ValueError, match=message) as error:
    weights.read_embeddings(tmp_path / 'given.npy')
  assert 'given.npy' in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('suffix', ['npy', 'safetensors', 'pth'])
@pytest.mark.parametrize('tenth', range(10))
def test_truncated_files(tmp_path, suffix, tenth):
  path = tmp_path / f'given.{suffix}'
  if suffix == 'npy':
    np.save(path, GIVEN)
  else:
    save_file({'text': GIVEN}, path)
  path.write_bytes(path.read_bytes()[:path.stat().st_size * tenth // 10])
  with pytest.raises(ValueError, match='must be one array of numbers') as error:
    weights.read_embeddings(path)
  assert '\n' not in str(error.value)


def test_files_of_several_arrays(tmp_path):
  save_file({'text': GIVEN, 'image': GIVEN}, tmp_path / 'given.safetensors')
  with pytest.raises(ValueError, match=r'must be one array of numbers: .*has 2 arrays'):
    weights.read_embeddings(tmp_path / 'given.safetensors')
