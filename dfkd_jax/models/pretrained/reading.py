"""Published weights as arrays by name, whatever the file's format."""

import json
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from dfkd_jax.models.pretrained import torch_files

_WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'net', 'params', 'weights')
_PREFIXES = ('module.', '_orig_mod.')  # Of DataParallel and torch.compile.
_SAFETENSORS = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
    'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """The arrays of a file of weights, by the names that they have there.

  Its content tells the format, not its suffix: safetensors, or what PyTorch
  saves (.pt, .pth, .th, .tar, .bin), read without PyTorch. A state dict may lie
  within a checkpoint, under 'state_dict', 'model', 'net' and the like; the
  prefixes 'module.' and '_orig_mod.', if all names have them, are dropped.

  Returns:
    Read-only arrays in the file's layout and dtypes, bfloat16 included.

  Raises:
    ValueError: If the file is damaged, of another format, holds no weights, or
      is a pickle that names anything else to be called than tensors.
  """
  data = pathlib.Path(path).read_bytes()
  try:
    if data[4:9] == b'\0\0\0\0{':  # After the header's length, of 64 bits.
      return _read_safetensors(data)
    if data.startswith(b'PK\x03\x04'):
      return unwrap(torch_files.read_zip(data))
    if data.startswith(b'\x80'):
      return unwrap(torch_files.read_legacy(data))
  except torch_files.RefusedError as error:
    raise ValueError(f'Refused to read {path}: it {error}.') from None
  except Exception as error:  # A damaged pickle may raise anything.
    detail = ' '.join(str(error).split()) or type(error).__name__
    raise ValueError(f'Could not read {path}: it is truncated or damaged ({detail}).') from error
  raise ValueError(f'Could not read {path}: it is neither safetensors nor saved by PyTorch 0.2 or later, '
                   f'or truncated; it has {len(data)} bytes and begins with {data[:8]!r}.')


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
  """The free text that a safetensors file carries; empty if none.

  Raises:
    ValueError: If it is no safetensors file.
  """
  try:
    with pathlib.Path(path).open('rb') as file:
      header = json.loads(file.read(struct.unpack('<Q', file.read(8))[0]))
    return dict(header.get('__metadata__', {}))
  except (struct.error, ValueError, AttributeError, OverflowError, MemoryError):
    raise ValueError(f'Could not read {path}: it is no safetensors file.') from None


def unwrap(tree: Any) -> dict[str, np.ndarray]:
  """The state dict within a checkpoint, without the prefixes of wrapped modules.

  Raises:
    RefusedError: If there is none, or an array's name is no string.
  """
  while isinstance(tree, Mapping) and (found := [k for k in _WRAPPERS if isinstance(tree.get(k), Mapping)]):
    tree = tree[found[0]]
  if not isinstance(tree, Mapping):
    raise torch_files.RefusedError(f'holds a {type(tree).__name__}, and no arrays by name')
  arrays = {name: array for name, array in tree.items() if isinstance(array, np.ndarray)}
  if not arrays or not all(isinstance(name, str) for name in arrays):
    raise torch_files.RefusedError(f'holds no arrays by name, but {sorted(map(str, tree))[:5]}')
  while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in arrays)), None):
    arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
  return arrays


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
  arrays = {}
  for name, tensor in safetensors.deserialize(data):
    if tensor['dtype'] not in _SAFETENSORS:
      raise torch_files.RefusedError(f'holds {name} of dtype {tensor["dtype"]}, which is not supported')
    arrays[name] = np.frombuffer(tensor['data'], _SAFETENSORS[tensor['dtype']]).reshape(tensor['shape'])
  return unwrap(arrays)
