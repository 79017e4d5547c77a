"""safetensors files, read and written: arrays, and free text about them."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from dfkd_jax.messages import RefusedError, safe_name
from dfkd_jax.types import PyTree

_DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
           'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8,
           'BOOL': np.bool_}


def read(data: bytes) -> dict[str, np.ndarray]:
  """Reads the arrays of a file, by name."""
  arrays = {}
  for name, tensor in safetensors.deserialize(data):
    if tensor['dtype'] not in _DTYPES:
      raise RefusedError(f'holds {safe_name(name)} of dtype {safe_name(tensor["dtype"])}, which '
                         'is not supported')
    numbers = np.frombuffer(tensor['data'], _DTYPES[tensor['dtype']])
    arrays[name] = numbers.reshape(tensor['shape'])
  return arrays


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
  """Reads the free text of a file, {} if there is none. ValueError: it is no safetensors file."""
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      return file.metadata() or {}
  except safetensors.SafetensorError:
    raise ValueError(f'Could not read {path}: it is no safetensors file.') from None


def save_safetensors(path: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
  """Writes a file, or overwrites it, with `to_safetensors` of the other arguments."""
  pathlib.Path(path).write_bytes(to_safetensors(*arguments, **options))


def to_safetensors(variables: Mapping[str, PyTree], metadata: Mapping[str, str] | None = None,
                   dtype: Any = None, probe: Any = None) -> bytes:
  """Makes a file of variables in Flax's layout, named 'params.conv1.kernel' and so on.

  Raises ValueError if a value is not finite in its dtype in the file.

  Args:
    metadata: Free text, for `read_metadata`.
    dtype: Dtype of the kernels, such as 'float16' for a file of half the size; None leaves it.
      Vectors always keep theirs, moments of batch norms among them.
    probe: From `make_probe`. Stored in the metadata, for `read_probe`.
  """
  arrays = {}
  for name, leaf in traverse_util.flatten_dict(dict(variables), sep='.').items():
    array = np.asarray(leaf, order='C')
    with np.errstate(over='ignore'):
      array = array.astype(dtype) if dtype is not None and array.ndim > 1 else array
    if not np.isfinite(array).all():
      raise ValueError(f'Parameter {name} holds values that are not finite in {array.dtype}.')
    arrays[name] = array
  metadata = dict(metadata or {}) | ({'probe': json.dumps(probe._asdict())} if probe else {})
  data = safetensors.numpy.save(arrays, metadata=metadata)
  # Sorts the metadata, which the library shuffles: equal weights give equal bytes.
  end = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:end]) | {'__metadata__': dict(sorted(metadata.items()))}
  text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text + data[end:]
