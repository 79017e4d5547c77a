"""Weights or whole models of Keras 2 and 3, as HDF5 files or in a .keras archive.

Only arrays are read. The model's configuration, from which Keras would build layers and functions,
is ignored.
"""

import collections
import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dfkd_jax.messages import RefusedError, safe_name
from dfkd_jax.weights.formats import archives

_NOT_WEIGHTS = ('optimizer/', 'optimizer_weights/')
# Keras 3 numbers the variables of a layer. Their names, by the layer's class and their count. A
# batch norm with 3 variables is ambiguous: its scale or its offset is missing.
_NAMES_BY_NUMBER = {
    **{(kind, count): ('kernel', 'bias')
       for kind in ('conv2d', 'depthwise_conv2d', 'dense') for count in (1, 2)},
    **{('separable_conv2d', count): ('depthwise_kernel', 'pointwise_kernel', 'bias')
       for count in (2, 3)},
    ('batch_normalization', 4): ('gamma', 'beta', 'moving_mean', 'moving_variance'),
    ('batch_normalization', 2): ('moving_mean', 'moving_variance')}


def read_h5(data: bytes) -> dict[str, np.ndarray]:
  """Reads the arrays of a file, named '<layer>/<weight>' ('conv1/kernel', 'bn_conv1/gamma')."""
  try:
    import h5py  # An extra: only this format needs it.
  except ImportError:
    raise RefusedError("is an HDF5 file, which h5py reads: pip install 'dfkd_jax[h5]'") from None
  datasets, layer_names = {}, {}

  def visit(path, item):
    if path.startswith(_NOT_WEIGHTS):
      return
    if isinstance(item, h5py.Dataset):
      datasets[path.removeprefix('model_weights/')] = item
    elif isinstance(name := item.attrs.get('name'), str):
      layer_names[path] = name

  with h5py.File(io.BytesIO(data), 'r') as file:
    file.visititems(visit)  # Follows no links, which may lead to other files.
    if (num_bytes := sum(dataset.nbytes for dataset in datasets.values())) > archives.LARGEST:
      raise RefusedError(
          f'announces {num_bytes} bytes of arrays, but at most {archives.LARGEST} are read')
    arrays = {path: _read_dataset(path, dataset) for path, dataset in datasets.items()}
  if any(re.search(r'(^|/)vars/\d+$', path) for path in arrays):
    counts = collections.Counter(path.rpartition('/vars/')[0] for path in arrays)
    names = [_name_variable(path, counts, layer_names) for path in arrays]
    return shorten_names(zip(names, arrays.values(), strict=True))
  return shorten_names(arrays.items())


def shorten_names(arrays: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Drops ':0' and repeated scopes from names: 'conv1/conv1/kernel:0' becomes 'conv1/kernel'."""
  result = {}
  for name, array in arrays:
    parts = re.sub(r':\d+$', '', name).strip('/').split('/')
    short = '/'.join(
        part for part, before in zip(parts, [None, *parts], strict=False) if part != before)
    if short in result:
      raise RefusedError(f'holds two arrays called {safe_name(short)}')
    result[short] = array
  return result


def _read_dataset(path: str, dataset: Any) -> np.ndarray:
  if dataset.is_virtual or dataset.external is not None:
    raise RefusedError(f'keeps {safe_name(path)} in another file, which is not opened')
  if dataset.dtype.kind not in 'fiub' and dataset.attrs.get('dtype') != 'bfloat16':
    raise RefusedError(
        f'holds {safe_name(path)} of dtype {safe_name(str(dataset.dtype))}, not of numbers')
  array = np.asarray(dataset[()])
  array = array.view(ml_dtypes.bfloat16) if dataset.attrs.get('dtype') == 'bfloat16' else array
  array.flags.writeable = False
  return array


def _name_variable(path: str, counts: Mapping[str, int], layer_names: Mapping[str, str]) -> str:
  """Names 'layers/sequential/layers/conv2d_1/vars/0' by its layers, as 'block/conv/kernel'."""
  layer, _, index = path.rpartition('/vars/')
  parts = layer.split('/')
  kind = re.sub(r'_\d+$', '', parts[-1]), counts[layer]
  if kind not in _NAMES_BY_NUMBER or set(parts[::2]) != {'layers'}:
    raise RefusedError(f'numbers the {counts[layer]} variables of {safe_name(layer)} instead of '
                       'naming them: save the model as .h5')
  groups = ['/'.join(parts[:end]) for end in range(2, len(parts) + 1, 2)]
  names = [layer_names.get(f'{group}/vars', group.rpartition('/')[2]) for group in groups]
  return '/'.join([*names, _NAMES_BY_NUMBER[kind][int(index)]])
