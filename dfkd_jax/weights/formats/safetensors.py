"""safetensors files: arrays, and free text about them."""

import json
import os
import pathlib
import struct

import ml_dtypes
import numpy as np
import safetensors

from dfkd_jax.messages import RefusedError, safe_name

_LARGEST_HEADER = 100_000_000  # Bytes: the limit of the safetensors library.
_DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
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
  """Reads the free text that a file carries; empty if there is none.

  Raises:
    ValueError: It is no safetensors file.
  """
  try:
    with pathlib.Path(path).open('rb') as file:
      size = struct.unpack('<Q', file.read(8))[0]
      header = json.loads(file.read(size) if size <= _LARGEST_HEADER else b'')
    return dict(header.get('__metadata__', {}))
  except (struct.error, ValueError, TypeError, AttributeError, RecursionError):
    raise ValueError(f'Could not read {path}: it is no safetensors file.') from None


def sort_metadata(data: bytes) -> bytes:
  """Sorts the metadata of a file, which the library shuffles. Equal weights give equal bytes."""
  end = 8 + struct.unpack('<Q', data[:8])[0]
  header = json.loads(data[8:end])
  header['__metadata__'] = dict(sorted(header.get('__metadata__', {}).items()))
  text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  return struct.pack('<Q', len(text)) + text + data[end:]
