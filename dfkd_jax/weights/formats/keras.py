"""What Keras saves in HDF5: weights or whole models of Keras 2 and 3, also those within a .keras archive.

Only arrays are read. A model's configuration, which Keras would build layers and functions from, is not looked at.
"""

import io
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dfkd_jax.messages import RefusedError, safe_name
from dfkd_jax.weights.formats import archives

_LARGEST = 1100  # Times the file, all arrays together: more than its compression can make of it.
_CHUNK = 64 * 2**20  # Bytes that a chunk may have at least, even of a smaller array.
_PIECE = 2 * 2**10  # Bytes that are unpacked at once, to be counted: 2 MB at most.
_TEXT = 1024  # Bytes of an attribute.
_GZIP, _FILTERS = 1, (1, 2, 3)  # Of HDF5: gzip, shuffle, fletcher32.
_NOT_WEIGHTS = ('optimizer/', 'optimizer_weights/')
# Keras 3 numbers a layer's variables. The names that go with the numbers, by the layer's class and how many there are;
# those of a batch norm with 3 would not tell whether its scale or its offset is missing.
_MOMENTS = ('gamma', 'beta', 'moving_mean', 'moving_variance')
_BY_NUMBER = {
    **{(kind, count): ('kernel', 'bias')[:count] for kind in ('conv2d', 'depthwise_conv2d', 'dense')
       for count in (1, 2)},
    **{('separable_conv2d', count): ('depthwise_kernel', 'pointwise_kernel', 'bias')[:count] for count in (2, 3)},
    ('batch_normalization', 4): _MOMENTS,
    ('batch_normalization', 2): _MOMENTS[2:],
}


def read_h5(data: bytes, num_bytes: int | None = None) -> dict[str, np.ndarray]:
  """The arrays of a file, called '<layer>/<weight>' ('conv1/kernel', 'bn_conv1/gamma').

  Args:
    data: All bytes of the file.
    num_bytes: Of what the file itself was unpacked from; None if it was not.

  Raises:
    RefusedError: If h5py is not installed, an array does not hold numbers, its name is not stored, or the arrays are
      larger than compression makes of so many bytes, or than `archives.LARGEST`.
    Exception: Of any kind, if the file is damaged.
  """
  try:
    import h5py  # An extra, which no other format needs.
  except ImportError:
    raise RefusedError("is an HDF5 file, which h5py reads: pip install 'dfkd_jax[h5]'") from None
  arrays, labels = {}, {}
  num_bytes = len(data) if num_bytes is None else num_bytes
  most = min(_LARGEST * num_bytes, archives.LARGEST)

  def visit(path: str, item: Any) -> None:  # Nothing that a link leads to, which may be another file.
    if not path.startswith(_NOT_WEIGHTS):
      if isinstance(item, h5py.Dataset):
        before = sum(array.nbytes for array in arrays.values())
        arrays[path.removeprefix('model_weights/')] = _array(path, item, most - before, num_bytes)
      elif name := _text(item, 'name'):
        labels[path] = name

  with h5py.File(io.BytesIO(data), 'r') as file:
    file.visititems(visit)
  if any(re.search(r'(^|/)vars/\d+$', path) for path in arrays):
    return named(zip(_named_by_class(arrays, labels), arrays.values(), strict=True))
  return named(arrays.items())


def read_keras(data: bytes) -> dict[str, np.ndarray]:
  """As `read_h5`, of the archive that Keras 3 saves; refused too if its weights are larger than `archives.LARGEST`."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    weights = archive.getinfo('model.weights.h5')
    archives.check_sizes([weights])
    return read_h5(archives.unpacked(archive, weights), len(data))


def named(arrays: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Arrays by names without ':0', and without repeated scopes ('conv1/conv1/kernel:0' is 'conv1/kernel').

  Raises:
    RefusedError: If two arrays have one name.
  """
  result = {}
  for name, array in arrays:
    parts = re.sub(r':\d+$', '', name).strip('/').split('/')
    short = '/'.join(part for part, before in zip(parts, [None, *parts], strict=False) if part != before)
    if short in result:
      raise RefusedError(f'holds two arrays called {safe_name(short)}')
    result[short] = array
  return result


def _array(path: str, dataset: Any, left: int, num_bytes: int) -> np.ndarray:
  """What a file of `num_bytes` holds; `left` of it are what it may yet unpack to."""
  if dataset.is_virtual or dataset.external is not None:
    raise RefusedError(f'keeps {safe_name(path)} in another file, which is not looked for')
  if dataset.nbytes > left:  # Arrays that were never written take no room in a file, however large.
    raise RefusedError(f'announces {dataset.nbytes} bytes of {safe_name(path)}, and has {num_bytes} bytes itself')
  if dataset.chunks is not None:
    _check_chunks(safe_name(path), dataset, left)
  if _text(dataset, 'dtype') == 'bfloat16' and dataset.dtype.itemsize == 2:
    array = dataset[()].view(ml_dtypes.bfloat16)
  elif dataset.dtype.kind in 'fiub':
    array = np.asarray(dataset[()])
  else:
    raise RefusedError(f'holds {safe_name(path)} of dtype {safe_name(str(dataset.dtype))}, which is not one of numbers')
  array.flags.writeable = False
  return array


def _text(item: Any, key: str) -> str | None:
  """An attribute that is a text, or a short one at least; None if there is no such."""
  if key not in item.attrs:
    return None
  stored = item.attrs.get_id(key)
  return str(item.attrs[key]) if stored.shape == () and stored.dtype.itemsize <= _TEXT else None


def _check_chunks(path: str, dataset: Any, left: int) -> None:
  """HDF5 itself would unpack all that a chunk holds, however much more that is than it or the array announces."""
  properties = dataset.id.get_create_plist()
  filters = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
  if set(filters) - set(_FILTERS) or len(set(filters)) < len(filters):
    raise RefusedError(f'packs {path} by filters {filters} of HDF5, of which {_FILTERS} are supported, once each')
  size, infos = math.prod(dataset.chunks) * dataset.id.get_type().get_size(), []
  most = math.prod(-(-n // chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
  most = min(most, dataset.file.id.get_filesize())

  def visit(info: Any) -> bool | None:  # Anything but None ends the visits.
    infos.append((info.chunk_offset, info.size))
    return True if len(infos) > most else None

  dataset.id.chunk_iter(visit)
  if size > max(dataset.nbytes, _CHUNK) or len(infos) > most or size * len(infos) > left:
    raise RefusedError(f'keeps the {dataset.nbytes} bytes of {path} in {len(infos)} chunks of {size} bytes')
  for offset, stored in infos if _GZIP in filters else ():
    if stored > 2 * size + _PIECE:  # More than what does not get any smaller takes.
      raise RefusedError(f'holds a chunk of {path} of {stored} bytes, which announces {size}')
    skipped, data = dataset.id.read_direct_chunk(offset)
    if not skipped >> filters.index(_GZIP) & 1 and _unpacks_to_more(data, size + 4):  # With a checksum.
      raise RefusedError(f'holds a chunk of {path} that unpacks to more than the {size} bytes that it announces')


def _unpacks_to_more(data: bytes, size: int) -> bool:
  unpacker, count = zlib.decompressobj(), 0
  for begin in range(0, len(data), _PIECE):
    count += len(unpacker.decompress(data[begin:begin + _PIECE]))
    if count > size or unpacker.eof:
      break
  return count > size


def _named_by_class(paths: Iterable[str], labels: Mapping[str, str]) -> list[str]:
  """Names for paths such as 'layers/conv2d_1/vars/0'; `labels` has the name of a layer by its group."""
  layers = [path.rpartition('/vars/')[0] for path in paths]
  return [f'{_layer_name(layer, labels)}/{_weight_name(layer, int(path.rpartition("/")[2]), layers.count(layer))}'
          for layer, path in zip(layers, paths, strict=True)]


def _layer_name(layer: str, labels: Mapping[str, str]) -> str:
  """'layers/sequential/layers/conv2d_1' as 'block/conv', if the layers are called so."""
  parts = layer.split('/')
  groups = ['/'.join(parts[:end]) for end in range(2, len(parts) + 1, 2)]
  return '/'.join(labels.get(f'{group}/vars', group.rpartition('/')[2]) for group in groups)


def _weight_name(layer: str, index: int, count: int) -> str:
  parts = layer.split('/')
  kind = re.sub(r'_\d+$', '', parts[-1])
  if (kind, count) not in _BY_NUMBER or set(parts[::2]) != {'layers'}:
    raise RefusedError(f'numbers the {count} variables of {safe_name(layer)} instead of naming them: save the model as .h5')
  return _BY_NUMBER[kind, count][index]
