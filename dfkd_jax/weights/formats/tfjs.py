"""A layers model of TensorFlow.js: model.json, which lists the weights, and files that hold them end to end."""

import collections
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfkd_jax.messages import RefusedError, first_line, safe_name
from dfkd_jax.weights.formats.keras import named

_DTYPES = {name: np.dtype(name) for name in ('float32', 'float16', 'int32', 'uint8', 'bool')}
_DIMENSIONS = 64  # Of an array of NumPy.
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
  arrays, groups = [], _manifest(data)
  files = [[_shard(folder, name) for name in group['paths']] for group in groups]
  _check_files(groups, files)
  for group, paths in zip(groups, files, strict=True):
    arrays += _group(group['weights'], b''.join(path.read_bytes() for path in paths))
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
    raise RefusedError(f'is truncated or damaged ({first_line(error)})') from error


def _manifest(data: bytes) -> Sequence[Mapping[str, Any]]:
  model = json.loads(data)
  if not isinstance(model, dict) or 'weightsManifest' not in model:
    raise RefusedError('is JSON, but has no weightsManifest, as a model of TensorFlow.js would')
  if model.get('format', 'layers-model') != 'layers-model':
    raise RefusedError(f'is a {safe_name(model["format"])} of TensorFlow.js, of which the layers-model is supported')
  times = collections.Counter(name for group in model['weightsManifest'] for name in group['paths'])
  if twice := [name for name, count in times.items() if count > 1]:
    raise RefusedError(f'names its file {safe_name(twice[0])} twice')
  return model['weightsManifest']


def _group(entries: Sequence[Mapping[str, Any]], data: bytes) -> list[tuple[str, np.ndarray]]:
  """Arrays that lie end to end, and must fill the data."""
  arrays, offset = [], 0
  for entry in entries:
    stored, shape, count = _announced(entry)
    if offset + count * stored.itemsize > len(data):
      raise ValueError(f'{safe_name(entry["name"])} {shape} reaches beyond its files')
    numbers = np.frombuffer(data, stored, count, offset).reshape(shape)
    arrays.append((entry['name'], _decoded(numbers, entry)))
    offset += count * stored.itemsize
  if offset != len(data):
    raise ValueError(f'its files have {len(data)} bytes and should have {offset}')
  return arrays


def _announced(entry: Mapping[str, Any]) -> tuple[np.dtype, tuple[int, ...], int]:
  """Dtype, shape and count of the numbers in the file."""
  stored = _stored(entry)
  if len(entry['shape']) > _DIMENSIONS:
    raise RefusedError(f'holds {safe_name(entry["name"])} of more than {_DIMENSIONS} dimensions')
  shape = tuple(map(int, entry['shape']))
  if min(shape, default=0) < 0:
    raise ValueError(f'{safe_name(entry["name"])} has a dimension below 0')
  return stored, shape, math.prod(shape)


def _check_files(groups: Sequence[Mapping[str, Any]], files: Sequence[Sequence[pathlib.Path]]) -> None:
  """That no file is there twice, by whatever names, and each group is as long as its arrays, before any is read."""
  seen = {}
  for group, paths in zip(groups, files, strict=True):
    found = [path.stat() for path in paths]
    for path, stat in zip(paths, found, strict=True):
      if (other := seen.setdefault((stat.st_dev, stat.st_ino), path)) is not path:
        raise RefusedError(f'names one file twice, as {safe_name(other.name)} and {safe_name(path.name)}')
    num_bytes = sum(stat.st_size for stat in found)
    wanted = sum(count * stored.itemsize for stored, _, count in map(_announced, group['weights']))
    if num_bytes != wanted:
      raise ValueError(f'its files have {num_bytes} bytes and should have {safe_name(wanted)}')


def _inside(name: str) -> str:
  """The name as it is; links are the user's own, such as those to the blobs of the hub's cache, and are followed."""
  path = pathlib.PurePosixPath(name)
  if path.is_absolute() or '..' in path.parts or '\\' in name or pathlib.PureWindowsPath(name).drive:
    raise RefusedError(f"names '{safe_name(name)}', which lies outside of its folder")
  if {'', '.'} & set(name.removeprefix('./').split('/')):
    raise RefusedError(f"names '{safe_name(name)}', which is not the plain name of a file")
  return name


def _shard(folder: pathlib.Path, name: str) -> pathlib.Path:
  path = folder / _inside(name)
  if not path.is_file():
    raise RefusedError(f'lacks its file {safe_name(name)}')
  return path


def _stored(entry: Mapping[str, Any]) -> np.dtype:
  """The dtype of the numbers in the file."""
  quantization = entry.get('quantization')
  kinds, kind = (_STORED, quantization['dtype']) if quantization else (_DTYPES, entry['dtype'])
  if kind not in kinds:
    raise RefusedError(f'holds {safe_name(entry["name"])} as {safe_name(kind)}, which is not supported')
  return kinds[kind].newbyteorder('<')


def _decoded(numbers: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
  """The numbers meant: number * scale + min where they are quantized to integers."""
  quantization, dtype = entry.get('quantization'), _DTYPES.get(entry['dtype'])
  if not quantization:
    return numbers
  if dtype not in (np.float32, np.int32):
    raise RefusedError(f'holds {safe_name(entry["name"])} quantized from {safe_name(entry["dtype"])}, which is not supported')
  if quantization['dtype'] == 'float16':
    return numbers.astype(dtype)
  values = numbers.astype(np.float32) * np.float32(quantization['scale']) + np.float32(quantization['min'])
  return np.rint(values).astype(dtype) if dtype == np.int32 else values
