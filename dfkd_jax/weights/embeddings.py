"""Embeddings of classes, from a file of the user."""

import os

import numpy as np

from dfkd_jax import messages, paths
from dfkd_jax.weights import reading


def load(path: str | os.PathLike) -> np.ndarray:
  """Reads one array as float32, from a .npy file or a file of weights with one array."""
  path = paths.expand_path(path, 'embeddings')
  try:
    if path.suffix == '.npy':
      with path.open('rb') as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    else:
      array, *others = reading.read(path).values()
      if others:
        raise messages.RefusedError(f'has {1 + len(others)} arrays')
    return array.astype(np.float32, casting='same_kind')
  except Exception as error:  # A damaged file may raise anything.
    detail = messages.one_line(error) or type(error).__name__
    raise ValueError(
        f'embeddings are {str(path)!r}, must be one array of numbers: {detail}') from error
