"""Loads published weights into the variables of a module."""

import os

from flax import linen as nn

from dfkd_jax.messages import one_line
from dfkd_jax.types import PyTree
from dfkd_jax.weights.name_schemes import translate_names
from dfkd_jax.weights.reading import read
from dfkd_jax.weights.torch_layout import ShapeError, to_variables, unflatten_variables


def load(
    path: str | os.PathLike[str], module: nn.Module, image_shape: tuple[int, ...]
) -> dict[str, PyTree]:
  """Loads the variables of a module from published weights, or from a file of `save_safetensors`.

  Args:
    path: See `read`. The content tells the format.
    module: The architecture of the weights.
    image_shape: Shape of its input without the batch: [H, W, C], or [Z] for a generator.

  Returns:
    {'params': ..., 'batch_stats': ...} in the dtypes of `module.init`; half precision is widened.

  Raises:
    ValueError: The file cannot be read, or does not fit the module. Names the first parameter that
      does not fit, both shapes, and both numbers of classes if these differ.
  """
  arrays = read(path)
  try:
    if all(name.startswith(('params.', 'batch_stats.')) for name in arrays):
      return unflatten_variables(arrays, module, image_shape)
    return to_variables(translate_names(arrays), module, image_shape)
  except ValueError as error:
    hint = _explain_classes(error, getattr(module, 'num_classes', None))
    raise ValueError(f'{path} does not fit: {one_line(error)}{hint}') from None
  except Exception as error:  # Odd names and shapes may raise anything.
    detail = one_line(f'{type(error).__name__} {error}')
    raise ValueError(
        f'{path} does not fit: its names and shapes cannot be converted ({detail}).') from error


def _explain_classes(error: ValueError, num_classes: int | None) -> str:
  """Adds both numbers of classes to an error, if only the last axis of one parameter differs."""
  if not isinstance(error, ShapeError) or not error.stored or not error.expected:
    return ''
  (*before, classes), (*expected, last) = error.stored, error.expected
  if before != expected or last != num_classes:
    return ''
  return (f' The weights seem to have {classes} classes, the network {num_classes} '
          '(dataset.num_classes).')
