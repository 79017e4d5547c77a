"""Layers models of TensorFlow.js: model.json lists the weights, files hold them end to end."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfkd_jax.messages import RefusedError, safe_name
from dfkd_jax.weights.formats.keras import shorten_names

_DTYPES = ('float32', 'float16', 'int32', 'uint8', 'bool')
_QUANTIZED_DTYPES, _DECODED_DTYPES = ('float16', 'uint8', 'uint16'), ('float32', 'int32')


def read(data: bytes, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the arrays of a model.json in a folder, as 'conv1/kernel'. Decodes quantized ones."""
  list_shards(data, folder)
  arrays = []
  for group in _read_manifest(data):
    content = b''.join((folder / name).read_bytes() for name in group['paths'])
    arrays += _split_group(group['weights'], content)
  return shorten_names(arrays)


def list_shards(data: bytes, folder: pathlib.Path | None = None) -> list[str]:
  """Lists the files that a model.json names, in order. If given, the folder must hold them all."""
  names = [name for group in _read_manifest(data) for name in group['paths']]
  for name in names:
    path = pathlib.PureWindowsPath(name)  # Separates at '/' too.
    if path.anchor or '..' in path.parts:
      raise RefusedError(f"names '{safe_name(name)}', which lies outside of its folder")
    if folder and not (folder / name).is_file():
      raise RefusedError(f'lacks its file {safe_name(name)}')
  return names


def _read_manifest(data: bytes) -> Sequence[Mapping[str, Any]]:
  model = json.loads(data)
  if not isinstance(model, dict) or 'weightsManifest' not in model:
    raise RefusedError('is JSON, but has no weightsManifest, as a model of TensorFlow.js would')
  if model.get('format', 'layers-model') != 'layers-model':
    raise RefusedError(
        f'is a {safe_name(model["format"])} of TensorFlow.js; only the layers-model is supported')
  return model['weightsManifest']


def _split_group(entries: Sequence[Mapping[str, Any]], data: bytes) -> list[tuple[str, np.ndarray]]:
  """Splits the content of a group's files into its arrays, which lie end to end."""
  arrays, offset = [], 0
  for entry in entries:
    dtype, shape, quantization = entry['dtype'], entry['shape'], entry.get('quantization')
    stored = quantization['dtype'] if quantization else dtype
    pairs = ((dtype, _DECODED_DTYPES), (stored, _QUANTIZED_DTYPES))
    for each, supported in pairs if quantization else ((dtype, _DTYPES),):
      if each not in supported:
        raise RefusedError(
            f'holds {safe_name(entry["name"])} as {safe_name(each)}, which is not supported')
    numbers = np.frombuffer(data, np.dtype(stored).newbyteorder('<'), math.prod(shape), offset)
    offset += numbers.nbytes
    if quantization and stored != 'float16':  # Decodes integers.
      scale, shift = np.float32(quantization['scale']), np.float32(quantization['min'])
      numbers = numbers.astype(np.float32) * scale + shift
      numbers = np.rint(numbers) if dtype == 'int32' else numbers
    arrays.append((entry['name'], numbers.astype(dtype, copy=False).reshape(shape)))
  if offset != len(data):
    raise ValueError(f'its files have {len(data)} bytes and should have {offset}')
  return arrays
