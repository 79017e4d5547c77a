"""Files of safetensors that are written: their bytes, dtypes and metadata."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from torch_files import saved

from dfkd_jax import weights


def test_the_same_weights_are_the_same_bytes(tmp_path):
  variables = {'params': {'fc': {'kernel': jnp.ones((2, 3)), 'bias': jnp.zeros(3)}}}
  metadata = {f'key{index}': 'é' * index for index in range(9)}
  contents = set()
  for index in range(5):
    weights.save_safetensors(tmp_path / str(index), variables, metadata)
    contents.add((tmp_path / str(index)).read_bytes())
  assert len(contents) == 1
  assert weights.read_metadata(tmp_path / '0') == metadata
  assert set(weights.read(tmp_path / '0')) == {'params.fc.kernel', 'params.fc.bias'}
  weights.save_safetensors(tmp_path / 'one', variables, {'a': 'é"\\'})
  kernel, bias = np.ones((2, 3), np.float32), np.zeros(3, np.float32)
  assert (tmp_path / 'one').read_bytes() == safetensors_numpy.save(
      {'params.fc.kernel': kernel, 'params.fc.bias': bias}, metadata={'a': 'é"\\'})


def test_values_beyond_half_precision_are_refused(tmp_path):
  variables = {'params': {'fc': {'kernel': jnp.full((2, 3), 1e6)}}}
  with pytest.raises(ValueError, match=r'params\.fc\.kernel holds values .* finite in float16'):
    weights.save_safetensors(tmp_path / 'w', variables, dtype='float16')
  assert not (tmp_path / 'w').exists()


def test_metadata_of_another_format_is_refused(tmp_path):
  (tmp_path / 'w').write_bytes(saved('zip'))
  with pytest.raises(ValueError, match='it is no safetensors file'):
    weights.read_metadata(tmp_path / 'w')
