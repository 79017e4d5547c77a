"""Embeddings of classes, from a file of the user's."""

import os
import pathlib

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file


def load(path: str | os.PathLike, num_classes: int) -> np.ndarray:
  """Reads [K, E] float32: a .npy file, or a .safetensors file with one tensor; nothing in it is run.

  Args:
    path: Of the file.
    num_classes: K.

  Raises:
    ValueError: In one line, what is wrong with the file.
  """
  path = pathlib.Path(path).expanduser()
  try:
    found = _read(path)
  except OSError as error:
    raise ValueError(f'embeddings are {str(path)!r}, which cannot be read: {error.strerror or error}.') from error
  except (ValueError, SafetensorError) as error:
    raise ValueError(
        f'embeddings are {str(path)!r}, must be .npy or .safetensors with one array of numbers: {error}.') from error
  if found.ndim != 2 or found.shape[0] != num_classes or not found.shape[1]:
    raise ValueError(f'embeddings of {str(path)!r} are {found.shape}, must be ({num_classes}, E): one for each class.')
  if not np.isfinite(found).all():
    raise ValueError(f'embeddings of {str(path)!r} are not finite.')
  if not found.std(0).any():
    raise ValueError(f'embeddings of {str(path)!r} are the same for all classes.')
  return found


def _read(path: pathlib.Path) -> np.ndarray:
  if path.suffix == '.safetensors':
    tensors = load_file(path)
    if len(tensors) != 1:
      raise ValueError(f'it has {len(tensors)} tensors')
    found = next(iter(tensors.values()))
  else:
    with path.open('rb') as file:
      found = np.lib.format.read_array(file, allow_pickle=False)
  if not (np.issubdtype(found.dtype, np.floating) or np.issubdtype(found.dtype, np.integer)):
    raise ValueError(f'it has values of type {found.dtype}')
  return found.astype(np.float32)
