"""Embeddings of classes, from a file of the user's."""

import os
import pathlib

import numpy as np

from dfkd_jax.models.pretrained import reading


def load(path: str | os.PathLike) -> np.ndarray:
  """Reads one array, float32: of a .npy file, or the only one of a file of weights (safetensors, PyTorch).

  Nothing that is in the file is run.

  Raises:
    ValueError: In one line, why there is no array of numbers to be read.
  """
  path = pathlib.Path(path).expanduser()
  try:
    found = _read(path)
  except OSError as error:
    raise ValueError(f'embeddings are {str(path)!r}, which cannot be read: {error.strerror or error}.') from error
  except ValueError as error:
    raise ValueError(f'embeddings are {str(path)!r}, must be one array of numbers: {error}') from error
  try:
    return found.astype(np.float32, casting='same_kind')
  except TypeError as error:
    raise ValueError(f'embeddings are {str(path)!r}, must be one array of numbers, not of {found.dtype}.') from error


def _read(path: pathlib.Path) -> np.ndarray:
  if path.suffix == '.npy':
    with path.open('rb') as file:
      return np.lib.format.read_array(file, allow_pickle=False)
  arrays = reading.read(path)
  if len(arrays) != 1:
    raise ValueError(f'the file has {len(arrays)}.')
  return next(iter(arrays.values()))
