"""Layers models of TensorFlow.js: model.json lists the weights, files hold them end to end."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfkd_jax.messages import RefusedError, safe_name
from dfkd_jax.weights.formats import archives
from dfkd_jax.weights.formats.keras import shorten_names

_DTYPES = {name: np.dtype(name) for name in ('float32', 'float16', 'int32', 'uint8', 'bool')}
_QUANTIZED_DTYPES = {name: np.dtype(name) for name in ('float16', 'uint8', 'uint16')}


def is_model_json(data: bytes) -> bool:
  """Whether a file with this beginning may be a model.json, and is no safetensors file."""
  return data.startswith(b'{') and data[4:8] != b'\0\0\0\0'


def read(data: bytes, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the arrays of a model, by names such as 'conv1/kernel'. Decodes quantized ones.

  Args:
    data: Content of model.json.
    folder: Where it lies, and all files that it names.
  """
  shards = [folder / name for name in list_shards(data)]
  if missing := [path for path in shards if not path.is_file()]:
    raise RefusedError(f'lacks its file {safe_name(missing[0].name)}')
  if (num_bytes := sum(path.stat().st_size for path in shards)) > archives.LARGEST:
    raise RefusedError(
        f'has {num_bytes} bytes in its files, but at most {archives.LARGEST} are read')
  arrays = []
  for group in _read_manifest(data):
    content = b''.join((folder / name).read_bytes() for name in group['paths'])
    arrays += _split_group(group['weights'], content)
  return shorten_names(arrays)


def list_shards(data: bytes) -> list[str]:
  """Lists the files that a model.json names, in order, each within its folder."""
  names = [name for group in _read_manifest(data) for name in group['paths']]
  for name in names:
    path = pathlib.PureWindowsPath(name)  # Separates at '/' too.
    if path.anchor or '..' in path.parts:
      raise RefusedError(f"names '{safe_name(name)}', which lies outside of its folder")
  return names


def _read_manifest(data: bytes) -> Sequence[Mapping[str, Any]]:
  model = json.loads(data)
  if not isinstance(model, dict) or 'weightsManifest' not in model:
    raise RefusedError('is JSON, but has no weightsManifest, as a model of TensorFlow.js would')
  if model.get('format', 'layers-model') != 'layers-model':
    raise RefusedError(
        f'is a {safe_name(model["format"])} of TensorFlow.js; only the layers-model is supported')
  return model['weightsManifest']


def _split_group(
    entries: Sequence[Mapping[str, Any]], data: bytes) -> list[tuple[str, np.ndarray]]:
  """Splits the content of a group's files into its arrays, which lie end to end."""
  arrays, offset = [], 0
  for entry in entries:
    dtype, shape = _stored_dtype(entry), tuple(map(int, entry['shape']))
    count = math.prod(shape)
    end = offset + count * dtype.itemsize
    if min(shape, default=0) < 0 or end > len(data):
      raise ValueError(f'{safe_name(entry["name"])} {shape} does not fit its files')
    numbers = np.frombuffer(data, dtype, count, offset).reshape(shape)
    arrays.append((entry['name'], _decode(numbers, entry)))
    offset = end
  if offset != len(data):
    raise ValueError(f'its files have {len(data)} bytes and should have {offset}')
  return arrays


def _stored_dtype(entry: Mapping[str, Any]) -> np.dtype:
  """The dtype of an array's numbers in the file."""
  quantization = entry.get('quantization')
  dtypes = _QUANTIZED_DTYPES if quantization else _DTYPES
  name = (quantization or entry)['dtype']
  if name not in dtypes:
    raise RefusedError(
        f'holds {safe_name(entry["name"])} as {safe_name(name)}, which is not supported')
  return dtypes[name].newbyteorder('<')


def _decode(numbers: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
  """Decodes quantized integers: number * scale + min."""
  quantization, dtype = entry.get('quantization'), _DTYPES.get(entry['dtype'])
  if not quantization:
    return numbers
  if dtype not in (np.float32, np.int32):
    raise RefusedError(f'holds {safe_name(entry["name"])} quantized from '
                       f'{safe_name(entry["dtype"])}, which is not supported')
  if quantization['dtype'] == 'float16':
    return numbers.astype(dtype)
  scale, offset = np.float32(quantization['scale']), np.float32(quantization['min'])
  values = numbers.astype(np.float32) * scale + offset
  return np.rint(values).astype(dtype) if dtype == np.int32 else values
