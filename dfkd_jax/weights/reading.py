"""Reads published weights, whatever their format: as arrays by name, or for a module."""

import io
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from dfkd_jax.messages import RefusedError, explain_read_errors, one_line, safe_names
from dfkd_jax.paths import expand_path
from dfkd_jax.types import PyTree
from dfkd_jax.weights.formats import archives, keras, orbax, pytorch, safetensors, tfjs
from dfkd_jax.weights.name_schemes import translate_names
from dfkd_jax.weights.torch_layout import to_variables

HUB_FILES = ('model.safetensors', 'pytorch_model.bin')  # Usual names in repositories of the hub.
_WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'net', 'params', 'weights')
_AVERAGES = ('state_dict_ema', 'ema_state_dict', 'model_ema', 'ema')
_PREFIXES = ('module.', '_orig_mod.', 'model.')  # Of DataParallel, torch.compile, and trainers.
_MOST_NESTED = 8  # Wrappers and prefixes around the weights.
_UNSUPPORTED = {  # By the bytes at an offset.
    (0, b'\x93NUMPY'): 'one array of NumPy without a name; numpy.savez keeps names',
    (4, b'TFL3'): 'TensorFlow Lite', (0, b'GGUF'): 'GGUF',
    (0, b'\x1f\x8b'): 'compressed by gzip; unpack it',
    (257, b'ustar'): 'a tar archive; unpack it'}


def read(path: str | os.PathLike[str], entry: str | None = None) -> dict[str, np.ndarray]:
  """Reads the arrays of a file or folder of weights, by their names in it.

  The content tells the format, not the suffix:

  * safetensors;
  * PyTorch (.pt, .pth, .th, .tar, .bin), read without PyTorch;
  * NumPy's archives (.npz);
  * Keras 2 and 3 (.h5, .keras), with h5py;
  * a layers model of TensorFlow.js: model.json, or its folder;
  * a folder of Orbax; for a run of this program, the latest student;
  * a folder with model.safetensors or pytorch_model.bin.

  Arrays keep the file's layout and dtypes, including bfloat16. Names look like 'conv1/kernel' from
  Keras and 'params.conv1.kernel' from Orbax. A state dict may lie within a checkpoint, under
  'state_dict', 'model', 'net' and the like. An average of weights ('ema', 'state_dict_ema' and the
  like) is read on request, or if there is no other. Drops the prefixes 'module.', '_orig_mod.' and
  'model.' if all names have them.

  `entry` is a key within a checkpoint, with dots for nested keys ('ema.model'). 'ema' stands for
  any of the names of averages. The path 'file.pth#ema' is short for entry='ema'.

  Raises OSError if there is no such file. Raises ValueError if it is damaged, of another format,
  has no weights or no such entry, or is a pickle that names anything but tensors.
  """
  path, chosen = split_entry(path)
  entry = entry or chosen
  data = None if path.is_dir() else path.read_bytes()
  with explain_read_errors(path):
    if data is None:
      path = find_weights(path)
      if path.is_dir():
        return orbax.read(path, entry)
      data = path.read_bytes()
    return _find_state_dict(_read_file(data, path.parent), entry)


def load(path: str | os.PathLike[str], module: nn.Module,
         image_shape: tuple[int, ...]) -> dict[str, PyTree]:
  """Loads the variables of a module from published weights, or from a file of `save_safetensors`.

  Returns {'params': ..., 'batch_stats': ...} in the dtypes of `module.init`; half precision is
  widened. `image_shape` is the shape of one input: [H, W, C], or [Z] for a generator.

  Raises ValueError if the file cannot be read (see `read`), or does not fit the module: names the
  first parameter, both shapes, and both numbers of classes if these differ.
  """
  arrays = read(path)
  try:
    return to_variables(translate_names(arrays), module, image_shape)
  except ValueError as error:
    raise ValueError(f'{path} does not fit: {one_line(error)}') from None


def read_embeddings(path: str | os.PathLike) -> np.ndarray:
  """Reads embeddings of classes, float32, from a .npy file or a file of weights with one array."""
  path = expand_path(path, 'embeddings')
  try:
    if path.suffix == '.npy':
      with path.open('rb') as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    else:
      array, *others = read(path).values()
      if others:
        raise RefusedError(f'has {1 + len(others)} arrays')
    return array.astype(np.float32, casting='same_kind')
  except Exception as error:  # A damaged file may raise anything.
    detail = one_line(error) or type(error).__name__
    raise ValueError(
        f'embeddings are {str(path)!r}, must be one array of numbers: {detail}') from error


def split_entry(path: str | os.PathLike[str]) -> tuple[pathlib.Path, str | None]:
  """Splits 'file.pth#ema' into file and entry, unless a file has this name."""
  name, _, entry = os.fspath(path).rpartition('#')
  if not name or not entry or pathlib.Path(path).exists():
    return pathlib.Path(path), None
  return pathlib.Path(name), entry


def find_weights(folder: pathlib.Path) -> pathlib.Path:
  """Finds the tree of Orbax (a folder) or the file of weights in a folder, or is refused."""
  if tree := orbax.find_checkpoint(folder):
    return tree
  for name in ('model.json', *HUB_FILES):
    if (folder / name).is_file():
      return folder / name
  raise RefusedError(
      f'is a folder without model.json of TensorFlow.js, a checkpoint of Orbax or {HUB_FILES[0]}; '
      f'it holds {safe_names(path.name for path in folder.iterdir())}')


def _read_file(data: bytes, folder: pathlib.Path) -> Any:
  """Reads arrays by name, or the nested dicts that a checkpoint has around them."""
  for (offset, magic), name in _UNSUPPORTED.items():
    if data.startswith(magic, offset):
      raise RefusedError(f'is {name}')
  if data[4:9] == b'\0\0\0\0{':  # After the header's length, of 64 bits.
    return safetensors.read(data)
  if data.startswith(b'{'):
    return tfjs.read(data, folder)
  if data.startswith(b'PK\x03\x04'):
    return _read_archive(zipfile.ZipFile(io.BytesIO(data)))
  if data.startswith(b'\x80'):
    return pytorch.read_legacy(data)
  if data.startswith(b'\x89HDF\r\n\x1a\n'):
    return keras.read_h5(data)
  raise RefusedError(
      'is none of safetensors, PyTorch 0.2 or later, NumPy (.npz), Keras (.h5) and TensorFlow.js, '
      f'or truncated; it has {len(data)} bytes and begins with {data[:8]!r}')


def _read_archive(archive: zipfile.ZipFile) -> Any:
  archives.check_sizes(archive.infolist())
  names = archive.namelist()
  if names and all(name.endswith('.npy') for name in names):
    return archives.read_npz(archive)
  if 'model.weights.h5' in names:
    return keras.read_h5(archive.read('model.weights.h5'))
  return pytorch.read_zip(archive)


def _find_state_dict(tree: Any, entry: str | None) -> dict[str, np.ndarray]:
  """Finds the state dict in nested dicts, and drops the prefixes of wrapped modules."""
  for key in entry.split('.') if entry else ():
    nodes = _nested_dicts(tree)
    names = [name for name in (key, *(_AVERAGES if key == 'ema' else ())) if name in nodes]
    if not names:
      raise RefusedError(f'holds no entry {key!r}, but {safe_names(nodes, 9) or "arrays alone"}')
    tree = nodes[names[0]]
  for _ in range(_MOST_NESTED):
    nodes = _nested_dicts(tree)
    tree = next((nodes[key] for key in _WRAPPERS + _AVERAGES if key in nodes), tree)
  if not isinstance(tree, Mapping):
    raise RefusedError(f'holds a {type(tree).__name__}, and no arrays by name')
  arrays = {name: array for name, array in tree.items() if isinstance(array, np.ndarray)}
  if not arrays or not all(isinstance(name, str) for name in arrays):
    raise RefusedError(f'holds no arrays by name, but {safe_names(tree)}')
  if len(arrays) > 1:
    arrays.pop('n_averaged', None)  # The counter of PyTorch's AveragedModel.
  for _ in range(_MOST_NESTED):
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in arrays)), '')
    arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
  return arrays


def _nested_dicts(tree: Any) -> dict[Any, Mapping]:
  items = tree.items() if isinstance(tree, Mapping) else ()
  return {key: node for key, node in items if isinstance(node, Mapping)}
