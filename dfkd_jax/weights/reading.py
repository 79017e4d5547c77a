"""Published weights as arrays by name, whatever the file's format."""

import io
import json
import os
import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from dfkd_jax.messages import RefusedError, first_line, safe_name, safe_names
from dfkd_jax.paths import special
from dfkd_jax.weights.formats import keras, npz, orbax, pytorch, tfjs

IN_FOLDERS = ('model.safetensors', 'pytorch_model.bin')  # What the hub's folders call their weights.
_WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'net', 'params', 'weights')
_AVERAGED = ('state_dict_ema', 'ema_state_dict', 'model_ema', 'ema')
_PREFIXES = ('module.', '_orig_mod.', 'model.')  # Of DataParallel, torch.compile, and trainers.
_MOST_PREFIXES = 8  # That are dropped: a name of nothing else would take the square of its length.
_LARGEST_HEADER = 100_000_000  # Bytes, as the library of safetensors itself has it.
_OTHERS = {  # By the bytes from an offset.
    (0, b'\x93NUMPY'): 'one array of NumPy without a name; numpy.savez keeps names', (4, b'TFL3'): 'TensorFlow Lite',
    (0, b'GGUF'): 'GGUF',
    (0, b'\x1f\x8b'): 'compressed by gzip; unpack it', (257, b'ustar'): 'a tar archive; unpack it'}
_SAFETENSORS = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
    'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}


def read(path: str | os.PathLike[str], entry: str | None = None) -> dict[str, np.ndarray]:
  """The arrays of a file or folder of weights, by the names that they have there.

  The content tells the format, not the suffix: safetensors; what PyTorch saves (.pt, .pth, .th, .tar, .bin), read
  without PyTorch; NumPy's archives (.npz); Keras 2 and 3 (.h5, .keras), with h5py; a layers model of TensorFlow.js
  (model.json or its folder); a folder of Orbax (of this program's checkpoints: the student's latest); or a folder
  with model.safetensors or pytorch_model.bin.

  A state dict may lie within a checkpoint, under 'state_dict', 'model', 'net' and the like. An average of weights
  ('ema', 'state_dict_ema' and the like) is taken only where there is nothing else, or if it is asked for. The
  prefixes 'module.', '_orig_mod.' and 'model.', if all names have them, are dropped.

  Args:
    path: Of the file; 'file.pth#ema' is short for entry='ema'.
    entry: What to take of a checkpoint, by its key there, with dots for keys within ('ema.model'); 'ema' stands for
      any of the names of averages.

  Returns:
    Read-only arrays in the file's layout and dtypes, bfloat16 included. Keras' are called 'conv1/kernel', Orbax'
    'params.conv1.kernel'.

  Raises:
    OSError: If there is no such file.
    ValueError: If it is damaged, of another format, holds no weights or no such entry, or is a pickle that names
      anything else to be called than tensors.
  """
  path, chosen = split_entry(path)
  if kind := special(path):
    raise ValueError(f'Refused to read {path}: it is {kind}.')
  data = None if path.is_dir() else path.read_bytes()
  try:
    return _read_folder(path, entry or chosen) if data is None else _read_file(path, data, entry or chosen)
  except RefusedError as error:
    raise ValueError(f'Refused to read {path}: it {first_line(error)}.') from None
  except Exception as error:  # A damaged file may raise anything.
    detail = first_line(error) or type(error).__name__
    raise ValueError(f'Could not read {path}: it is truncated or damaged ({detail}).') from error


def split_entry(path: str | os.PathLike[str]) -> tuple[pathlib.Path, str | None]:
  """'file.pth#ema' as file and entry; a name with '#' that exists is no such pair."""
  name, _, entry = os.fspath(path).rpartition('#')
  if not name or not entry or pathlib.Path(path).exists():
    return pathlib.Path(path), None
  return pathlib.Path(name), entry


def parts(path: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
  """The files that `read` takes of a path: their folder, and their names in it, in order.

  That is the file itself; with a model.json the shards that it names; of a folder of Orbax all that lie in it; of other
  folders what is read of them, and nothing that lies beside it.

  Raises:
    OSError: If there is no such file.
    RefusedError: If a folder holds no weights, or a model.json is damaged, of another kind, or lacks a shard.
  """
  if kind := special(path):
    raise RefusedError(f'is {kind}')
  if path.is_dir():
    if (file := _weights_in(path)) is None:
      if orbax.found_in(path) is None:
        raise RefusedError('is a folder without weights')
      return path, sorted(item.relative_to(path).as_posix() for item in path.rglob('*') if item.is_file())
    return parts(file)
  with path.open('rb') as file:
    found = tfjs.shards(file.read()) if tfjs.begins(file.peek(8)) else []
  if lacking := [name for name in found if not (path.parent / name).is_file()]:
    raise RefusedError(f'lacks its file {safe_name(lacking[0])}')
  return path.parent, sorted({path.name, *found})


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
  """The free text that a safetensors file carries; empty if none.

  Raises:
    ValueError: If it is no safetensors file.
  """
  try:
    with pathlib.Path(path).open('rb') as file:
      size = struct.unpack('<Q', file.read(8))[0]
      header = json.loads(file.read(size) if size <= _LARGEST_HEADER else b'')
    return dict(header.get('__metadata__', {}))
  except (struct.error, ValueError, TypeError, AttributeError, RecursionError):
    raise ValueError(f'Could not read {path}: it is no safetensors file.') from None


def unwrap(tree: Any, entry: str | None = None) -> dict[str, np.ndarray]:
  """The state dict within a checkpoint, without the prefixes of wrapped modules.

  Args:
    tree: Nested dicts with arrays.
    entry: As in `read`.

  Raises:
    RefusedError: If there is none, or an array's name is no string.
  """
  for key in entry.split('.') if entry else ():
    tree = _entry(tree, key)
  while isinstance(tree, Mapping) and (
      found := [key for key in _WRAPPERS + _AVERAGED if isinstance(tree.get(key), Mapping)]):
    tree = tree[found[0]]
  if not isinstance(tree, Mapping):
    raise RefusedError(f'holds a {type(tree).__name__}, and no arrays by name')
  arrays = {name: array for name, array in tree.items() if isinstance(array, np.ndarray)}
  if not arrays or not all(isinstance(name, str) for name in arrays):
    raise RefusedError(f'holds no arrays by name, but {safe_names(tree)}')
  if len(arrays) > 1:
    arrays.pop('n_averaged', None)  # Counts, beside the averages of PyTorch's AveragedModel.
  for _ in range(_MOST_PREFIXES):
    if not (prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in arrays)), '')):
      break
    arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
  return arrays


def _read_file(path: pathlib.Path, data: bytes, entry: str | None) -> dict[str, np.ndarray]:
  if tfjs.begins(data):
    return unwrap(tfjs.read(data, path.parent), entry)
  for (offset, magic), name in _OTHERS.items():
    if data.startswith(magic, offset):
      raise RefusedError(f'is {name}')
  return unwrap(_tree(data), entry)


def _tree(data: bytes) -> Any:
  """What a file holds: arrays by name, or whatever a checkpoint has around them."""
  if data[4:9] == b'\0\0\0\0{':  # After the header's length, of 64 bits.
    return _read_safetensors(data)
  if data.startswith(b'PK\x03\x04'):
    return _read_archive(data)
  if data.startswith(b'\x80'):
    return pytorch.read_legacy(data)
  if data.startswith(b'\x89HDF\r\n\x1a\n'):
    return keras.read_h5(data)
  raise RefusedError('is none of safetensors, PyTorch 0.2 or later, NumPy (.npz), Keras (.h5) and TensorFlow.js, '
                     f'or truncated; it has {len(data)} bytes and begins with {data[:8]!r}')


def _read_archive(data: bytes) -> Any:
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    names = archive.namelist()
  if names and all(name.endswith('.npy') for name in names):
    return npz.read_npz(data)
  if 'model.weights.h5' in names:
    return keras.read_keras(data)
  return pytorch.read_zip(data)


def _read_folder(path: pathlib.Path, entry: str | None) -> dict[str, np.ndarray]:
  if tree := orbax.found_in(path):
    return orbax.read(tree, entry)
  if file := _weights_in(path):
    return _read_file(file, file.read_bytes(), entry)
  raise RefusedError(f'is a folder without model.json of TensorFlow.js, a checkpoint of Orbax or {IN_FOLDERS[0]}; '
                     f'it holds {safe_names(item.name for item in path.iterdir())}')


def _weights_in(folder: pathlib.Path) -> pathlib.Path | None:
  """The file that stands for a folder; None if there is none, or a tree of Orbax comes first."""
  files = [folder / name for name in ('model.json', *IN_FOLDERS) if (folder / name).is_file()]
  return files[0] if files and not orbax.found_in(folder) else None


def _entry(tree: Any, key: str) -> Any:
  """One step into a checkpoint."""
  keys = [key, *(_AVERAGED if key == 'ema' else ())]
  found = [tree[key] for key in keys if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping)]
  if not found:
    known = isinstance(tree, Mapping) and safe_names((name for name, value in tree.items() if isinstance(value, Mapping)), 9)
    raise RefusedError(f'holds no entry {key!r}, but {known or "arrays alone"}')
  return found[0]


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
  arrays = {}
  for name, tensor in safetensors.deserialize(data):
    if tensor['dtype'] not in _SAFETENSORS:
      raise RefusedError(f'holds {safe_name(name)} of dtype {safe_name(tensor["dtype"])}, which is not supported')
    arrays[name] = np.frombuffer(tensor['data'], _SAFETENSORS[tensor['dtype']]).reshape(tensor['shape'])
  return arrays
