"""Weights or whole models of Keras 2 and 3, as HDF5 files or in a .keras archive.

Only arrays are read. The model's configuration, from which Keras would build layers and functions,
is ignored.
"""

import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dfkd_jax.messages import RefusedError, safe_name
from dfkd_jax.weights.formats import archives

_LARGEST_RATIO = 1100  # All arrays to the file. HDF5's compression cannot reach more.
_NOT_WEIGHTS = ('optimizer/', 'optimizer_weights/')
# Keras 3 numbers the variables of a layer. Their names, by the layer's class and their count. A
# batch norm with 3 variables is ambiguous: its scale or its offset is missing.
_MOMENTS = ('gamma', 'beta', 'moving_mean', 'moving_variance')
_NAMES_BY_NUMBER = {
    **{(kind, count): ('kernel', 'bias')[:count]
       for kind in ('conv2d', 'depthwise_conv2d', 'dense') for count in (1, 2)},
    **{('separable_conv2d', count): ('depthwise_kernel', 'pointwise_kernel', 'bias')[:count]
       for count in (2, 3)},
    ('batch_normalization', 4): _MOMENTS,
    ('batch_normalization', 2): _MOMENTS[2:],
}


def read_h5(data: bytes) -> dict[str, np.ndarray]:
  """Reads the arrays of a file, named '<layer>/<weight>' ('conv1/kernel', 'bn_conv1/gamma')."""
  try:
    import h5py  # An extra: only this format needs it.
  except ImportError:
    raise RefusedError("is an HDF5 file, which h5py reads: pip install 'dfkd_jax[h5]'") from None
  arrays, layer_names = {}, {}
  limit = min(_LARGEST_RATIO * len(data), archives.LARGEST)

  def visit(path: str, item: Any) -> None:
    if path.startswith(_NOT_WEIGHTS):
      return
    if isinstance(item, h5py.Dataset):
      num_bytes = sum(array.nbytes for array in arrays.values()) + item.nbytes
      if num_bytes > limit:  # Arrays that were never written take no room in a file.
        raise RefusedError(f'announces {num_bytes} bytes up to {safe_name(path)}, but may at most '
                           f'hold {limit}')
      arrays[path.removeprefix('model_weights/')] = _read_dataset(path, item)
    elif isinstance(name := item.attrs.get('name'), str):
      layer_names[path] = name

  with h5py.File(io.BytesIO(data), 'r') as file:
    file.visititems(visit)  # Follows no links, which may lead to other files.
  if any(re.search(r'(^|/)vars/\d+$', path) for path in arrays):
    names = _name_numbered(arrays, layer_names)
    return shorten_names(zip(names, arrays.values(), strict=True))
  return shorten_names(arrays.items())


def read_keras(data: bytes) -> dict[str, np.ndarray]:
  """Reads the archive that Keras 3 saves, as `read_h5`."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    info = archive.getinfo('model.weights.h5')
    archives.check_sizes([info])
    return read_h5(archives.unpack(archive, info))


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
  if dataset.attrs.get('dtype') == 'bfloat16' and dataset.dtype.itemsize == 2:
    array = dataset[()].view(ml_dtypes.bfloat16)
  elif dataset.dtype.kind in 'fiub':
    array = np.asarray(dataset[()])
  else:
    raise RefusedError(
        f'holds {safe_name(path)} of dtype {safe_name(str(dataset.dtype))}, not of numbers')
  array.flags.writeable = False
  return array


def _name_numbered(paths: Iterable[str], layer_names: Mapping[str, str]) -> list[str]:
  """Names for paths such as 'layers/conv2d_1/vars/0', by the names of the layers' groups."""
  paths = [path.rpartition('/vars/') for path in paths]
  layers = [layer for layer, _, _ in paths]
  return [
      f'{_layer_name(layer, layer_names)}/{_weight_name(layer, int(index), layers.count(layer))}'
      for layer, _, index in paths]


def _layer_name(layer: str, layer_names: Mapping[str, str]) -> str:
  """'layers/sequential/layers/conv2d_1' as 'block/conv', if these are the layers' names."""
  parts = layer.split('/')
  groups = ['/'.join(parts[:end]) for end in range(2, len(parts) + 1, 2)]
  return '/'.join(
      layer_names.get(f'{group}/vars', group.rpartition('/')[2]) for group in groups)


def _weight_name(layer: str, index: int, count: int) -> str:
  parts = layer.split('/')
  kind = re.sub(r'_\d+$', '', parts[-1])
  if (kind, count) not in _NAMES_BY_NUMBER or set(parts[::2]) != {'layers'}:
    raise RefusedError(f'numbers the {count} variables of {safe_name(layer)} instead of naming '
                       'them: save the model as .h5')
  return _NAMES_BY_NUMBER[kind, count][index]
