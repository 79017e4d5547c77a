"""Published weights: files of safetensors or PyTorch to variables, and back."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

from dfkd_jax.models.pretrained.conversion import from_flat, from_variables, to_variables
from dfkd_jax.models.pretrained.naming import translate
from dfkd_jax.models.pretrained.reading import read, read_metadata
from dfkd_jax.types import PyTree

__all__ = [
    'from_flat', 'from_variables', 'load', 'read', 'read_metadata', 'save_safetensors', 'to_variables', 'translate']

_COLLECTIONS = ('params.', 'batch_stats.')


def load(path: str | os.PathLike[str], module: nn.Module, image_shape: tuple[int, ...]) -> dict[str, PyTree]:
  """Variables of a module from a file that PyTorch, safetensors or `save_safetensors` wrote.

  Args:
    path: Of the file; its content tells the format.
    module: The architecture that the weights are of.
    image_shape: Of its input without the batch, [H, W, C], or [Z] for a generator.

  Returns:
    {'params': ..., 'batch_stats': ...}, of the dtypes of `module.init`.

  Raises:
    ValueError: If the file cannot be read or does not fit the module; it names
      the first parameter that does not, and both shapes.
  """
  arrays = read(path)
  try:
    if all(name.startswith(_COLLECTIONS) for name in arrays):
      return from_flat(arrays, module, image_shape)
    return to_variables(translate(arrays), module, image_shape)
  except ValueError as error:
    raise ValueError(f'{path} does not fit: {error}') from None


def save_safetensors(
    path: str | os.PathLike[str],
    variables: Mapping[str, PyTree],
    metadata: Mapping[str, str] | None = None,
    dtype: Any = None,
) -> None:
  """Writes variables in Flax's layout, called 'params.conv1.kernel' and so on.

  Args:
    path: Of the file, which is overwritten.
    variables: As `module.init` gives them.
    metadata: Free text, which `read_metadata` gives back.
    dtype: Of kernels, such as 'float16' to halve the file; None as they are.
      Vectors, among them the moments of batch norms, always stay as they are.

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
  safetensors_numpy.save_file(arrays, os.fspath(path), metadata=dict(metadata or {}))
