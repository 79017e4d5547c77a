"""Embeddings of classes, from a file of the user's."""

import os
import pathlib

import numpy as np

from dfkd_jax import messages, paths
from dfkd_jax.weights import reading
from dfkd_jax.weights.formats import npz


def load(path: str | os.PathLike) -> np.ndarray:
  """Reads one array, float32: of a .npy file, or the only one of a file of weights (safetensors, PyTorch).

  Nothing that is in the file is run.

  Raises:
    ValueError: In one line, why there is no array of numbers to be read.
  """
  path = paths.expanded(path, 'embeddings')
  try:
    found = _read(path)
  except OSError as error:
    raise ValueError(f'embeddings are {str(path)!r}, which cannot be read: {error.strerror or error}.') from error
  except messages.RefusedError as error:
    raise ValueError(f'embeddings are {str(path)!r}, must be one array of numbers: it {messages.first_line(error)}.') from error
  except Exception as error:  # A damaged file may raise anything.
    detail = messages.first_line(error) or type(error).__name__
    raise ValueError(f'embeddings are {str(path)!r}, must be one array of numbers: {detail}') from error
  try:
    return found.astype(np.float32, casting='same_kind')
  except TypeError as error:
    raise ValueError(f'embeddings are {str(path)!r}, must be one array of numbers, not of '
                     f'{messages.safe_name(str(found.dtype))}.') from error


def _read(path: pathlib.Path) -> np.ndarray:
  if path.suffix == '.npy':
    return npz.read_npy(path)
  arrays = reading.read(path)
  if len(arrays) != 1:
    raise ValueError(f'the file has {len(arrays)}.')
  return next(iter(arrays.values()))
