"""A layers model of TensorFlow.js: model.json, which lists the weights, and files that hold them end to end."""

import collections
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfkd_jax.models.pretrained.errors import RefusedError
from dfkd_jax.models.pretrained.keras_files import named

_DTYPES = {name: np.dtype(name) for name in ('float32', 'float16', 'int32', 'uint8', 'bool')}
_STORED = {name: np.dtype(name) for name in ('float16', 'uint8', 'uint16')}  # What numbers are quantized to.


def begins(data: bytes) -> bool:
  """Whether a file that begins so may be a model.json, and no safetensors file whose length looks like one."""
  return data.startswith(b'{') and data[4:8] != b'\0\0\0\0'


def read(data: bytes, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a model, quantized ones decoded, by names such as 'conv1/kernel'.

  Args:
    data: Of model.json.
    folder: Where it lies, and the files that it names must lie too.

  Raises:
    RefusedError: If it is another kind of JSON or model, or a file is not there.
    Exception: Of any kind, if it is damaged.
  """
  arrays = []
  for group in _manifest(data):
    arrays += _group(group['weights'], b''.join(_shard(folder, name) for name in group['paths']))
  return named(arrays)


def shards(data: bytes) -> list[str]:
  """The files that a model.json names, in order, each within its folder.

  Raises:
    RefusedError: If it is another kind of JSON or model, is damaged, or names a file that is elsewhere.
  """
  try:
    return [_inside(name) for group in _manifest(data) for name in group['paths']]
  except RefusedError:
    raise
  except Exception as error:  # Of JSON that is nested too deep, too.
    raise RefusedError(f'is truncated or damaged ({" ".join(str(error).split())[:300]})') from error


def _manifest(data: bytes) -> Sequence[Mapping[str, Any]]:
  model = json.loads(data)
  if not isinstance(model, dict) or 'weightsManifest' not in model:
    raise RefusedError('is JSON, but has no weightsManifest, as a model of TensorFlow.js would')
  if model.get('format', 'layers-model') != 'layers-model':
    raise RefusedError(f'is a {model["format"]} of TensorFlow.js, of which the layers-model is supported')
  times = collections.Counter(name for group in model['weightsManifest'] for name in group['paths'])
  if twice := [name for name, count in times.items() if count > 1]:
    raise RefusedError(f'names its file {twice[0]} twice')
  return model['weightsManifest']


def _group(entries: Sequence[Mapping[str, Any]], data: bytes) -> list[tuple[str, np.ndarray]]:
  """Arrays that lie end to end, and must fill the data."""
  arrays, offset = [], 0
  for entry in entries:
    stored, shape = _stored(entry), tuple(map(int, entry['shape']))
    count = math.prod(shape)
    if min(shape, default=0) < 0 or offset + count * stored.itemsize > len(data):
      raise ValueError(f'{entry["name"]} {shape} reaches beyond its files')
    numbers = np.frombuffer(data, stored, count, offset).reshape(shape)
    arrays.append((entry['name'], _decoded(numbers, entry)))
    offset += count * stored.itemsize
  if offset != len(data):
    raise ValueError(f'its files have {len(data)} bytes and should have {offset}')
  return arrays


def _inside(name: str) -> str:
  """The name as it is; links are the user's own, such as those to the blobs of the hub's cache, and are followed."""
  path = pathlib.PurePosixPath(name)
  if path.is_absolute() or '..' in path.parts or '\\' in name or pathlib.PureWindowsPath(name).drive:
    raise RefusedError(f'names {name!r}, which lies outside of its folder')
  return name


def _shard(folder: pathlib.Path, name: str) -> bytes:
  path = folder / _inside(name)
  if not path.is_file():
    raise RefusedError(f'lacks its file {name}')
  return path.read_bytes()


def _stored(entry: Mapping[str, Any]) -> np.dtype:
  """The dtype of the numbers in the file."""
  quantization = entry.get('quantization')
  kinds, kind = (_STORED, quantization['dtype']) if quantization else (_DTYPES, entry['dtype'])
  if kind not in kinds:
    raise RefusedError(f'holds {entry["name"]} as {kind}, which is not supported')
  return kinds[kind].newbyteorder('<')


def _decoded(numbers: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
  """The numbers meant: number * scale + min where they are quantized to integers."""
  quantization, dtype = entry.get('quantization'), _DTYPES.get(entry['dtype'])
  if not quantization:
    return numbers
  if dtype not in (np.float32, np.int32):
    raise RefusedError(f'holds {entry["name"]} quantized from {entry["dtype"]}, which is not supported')
  if quantization['dtype'] == 'float16':
    return numbers.astype(dtype)
  values = numbers.astype(np.float32) * np.float32(quantization['scale']) + np.float32(quantization['min'])
  return np.rint(values).astype(dtype) if dtype == np.int32 else values
