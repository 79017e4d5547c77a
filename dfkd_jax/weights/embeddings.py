"""Embeddings of classes, from a file of the user."""

import os

import numpy as np

from dfkd_jax import messages, paths
from dfkd_jax.weights import reading
from dfkd_jax.weights.formats import npz


def load(path: str | os.PathLike) -> np.ndarray:
  """Reads one array as float32, from a .npy file or a file of weights with one array.

  Nothing in the file is run.

  Raises:
    ValueError: The file cannot be read, or is not one array of numbers.
  """
  path = paths.expand_path(path, 'embeddings')
  what = f'embeddings are {str(path)!r}'
  try:
    if path.suffix == '.npy':
      array = npz.read_npy(path)
    else:
      arrays = list(reading.read(path).values())
      if len(arrays) != 1:
        raise messages.RefusedError(f'has {len(arrays)} arrays')
      array = arrays[0]
    return array.astype(np.float32, casting='same_kind')
  except OSError as error:
    raise ValueError(f'{what}, which cannot be read: {error.strerror or error}.') from error
  except Exception as error:  # A damaged file may raise anything.
    detail = messages.one_line(error) or type(error).__name__
    raise ValueError(f'{what}, must be one array of numbers: {detail}') from error
