"""Published weights: files of PyTorch, Keras, TensorFlow.js, NumPy, Orbax or safetensors to variables, and back."""

import json
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

from dfkd_jax.messages import first_line
from dfkd_jax.types import PyTree
from dfkd_jax.weights.card import Card, Probe, check, describe, digest, digest_of, make_probe, stored_probe
from dfkd_jax.weights.formats.orbax import found_in, read_under
from dfkd_jax.weights.hub import check_hub, resolve
from dfkd_jax.weights.name_schemes import translate
from dfkd_jax.weights.reading import read, read_metadata
from dfkd_jax.weights.torch_layout import ShapeError, from_flat, from_variables, to_variables

__all__ = [
    'Card', 'Probe', 'check', 'check_hub', 'describe', 'digest', 'digest_of', 'found_in', 'from_flat', 'from_variables',
    'load', 'make_probe', 'read', 'read_metadata', 'read_under', 'resolve', 'save_safetensors', 'stored_probe',
    'to_safetensors', 'to_variables', 'translate',
]
_COLLECTIONS = ('params.', 'batch_stats.')


def load(path: str | os.PathLike[str], module: nn.Module, image_shape: tuple[int, ...]) -> dict[str, PyTree]:
  """Variables of a module from published weights, or those that `save_safetensors` wrote.

  Args:
    path: As `read` takes it; the content tells the format.
    module: The architecture that the weights are of.
    image_shape: Of its input without the batch, [H, W, C], or [Z] for a generator.

  Returns:
    {'params': ..., 'batch_stats': ...}, of the dtypes of `module.init`: half precision is widened to them.

  Raises:
    ValueError: If the file cannot be read or does not fit the module; it names
      the first parameter that does not, and both shapes, or both numbers of
      classes where all but the last layer fits.
  """
  arrays = read(path)
  try:
    return _converted(arrays, module, image_shape)
  except ValueError as error:
    other = _other_classes(arrays, module, image_shape, error)
    raise ValueError(f'{path} does not fit: {other or first_line(error)}') from None
  except Exception as error:  # Names and shapes that nobody thought of may raise anything.
    detail = f'{type(error).__name__} {first_line(error)}'.strip()
    raise ValueError(f'{path} does not fit: its names and shapes cannot be converted ({detail}).') from error


def _converted(arrays: Mapping[str, np.ndarray], module: nn.Module, image_shape: tuple[int, ...]) -> dict[str, PyTree]:
  if all(name.startswith(_COLLECTIONS) for name in arrays):
    return from_flat(arrays, module, image_shape)
  return to_variables(translate(arrays), module, image_shape)


def _other_classes(
    arrays: Mapping[str, np.ndarray], module: nn.Module, image_shape: tuple[int, ...], error: ValueError
) -> str | None:
  """What to say if the same module with another number of classes fits; else None."""
  own = getattr(module, 'num_classes', None)
  if not isinstance(error, ShapeError) or len(error.found) != len(error.wanted):
    return None
  differing = [pair for pair in zip(error.found, error.wanted, strict=True) if pair[0] != pair[1]]
  if len(differing) != 1 or differing[0][1] != own:
    return None
  classes = differing[0][0]
  try:
    _converted(arrays, module.clone(num_classes=classes), image_shape)
  except Exception:
    return None
  return f'the weights have {classes} classes, the network is built for {own} (dataset.num_classes).'


def save_safetensors(path: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
  """Writes what `to_safetensors` makes of further arguments to a file, which is overwritten."""
  pathlib.Path(path).write_bytes(to_safetensors(*arguments, **options))


def to_safetensors(
    variables: Mapping[str, PyTree],
    metadata: Mapping[str, str] | None = None,
    dtype: Any = None,
    probe: Probe | None = None,
) -> bytes:
  """Variables as a file in Flax's layout, called 'params.conv1.kernel' and so on.

  Args:
    variables: As `module.init` gives them.
    metadata: Free text, which `read_metadata` gives back.
    dtype: Of kernels, such as 'float16' to halve the file; None as they are.
      Vectors, among them the moments of batch norms, always stay as they are.
    probe: As `make_probe` gives it; kept in the metadata for `stored_probe`.

  Raises:
    ValueError: If a value is not finite, at the latest in that dtype.
  """
  arrays = {}
  for name, leaf in traverse_util.flatten_dict(dict(variables), sep='.').items():
    array = np.asarray(leaf, order='C')
    with np.errstate(over='ignore'):
      array = array.astype(dtype) if dtype is not None and array.ndim > 1 else array
    if not np.isfinite(array).all():
      raise ValueError(f'Parameter {name} holds values that are not finite in {array.dtype}.')
    arrays[name] = array
  about = dict(metadata or {}) | ({'probe': probe.to_json()} if probe else {})
  return _ordered(safetensors_numpy.save(arrays, metadata=about))


def _ordered(data: bytes) -> bytes:
  """The same file with its metadata in alphabetic order, which else is random: the same weights are the same bytes."""
  end = 8 + struct.unpack('<Q', data[:8])[0]
  header = json.loads(data[8:end])
  header['__metadata__'] = dict(sorted(header.get('__metadata__', {}).items()))
  text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  return struct.pack('<Q', len(text)) + text + data[end:]
