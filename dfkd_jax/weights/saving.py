"""Writes variables as safetensors files."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

from dfkd_jax.types import PyTree
from dfkd_jax.weights.formats import safetensors
from dfkd_jax.weights.probe import Probe


def save_safetensors(path: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
  """Writes a file, or overwrites it, with `to_safetensors` of the other arguments."""
  pathlib.Path(path).write_bytes(to_safetensors(*arguments, **options))


def to_safetensors(
    variables: Mapping[str, PyTree],
    metadata: Mapping[str, str] | None = None,
    dtype: Any = None,
    probe: Probe | None = None,
) -> bytes:
  """Makes a safetensors file of variables in Flax's layout, named 'params.conv1.kernel' and so on.

  Args:
    variables: As `module.init` returns them.
    metadata: Free text, for `read_metadata`.
    dtype: Dtype of the kernels, such as 'float16' for a file of half the size; None leaves it.
      Vectors always keep theirs, moments of batch norms among them.
    probe: Stored in the metadata, for `read_probe`.

  Raises:
    ValueError: A value is not finite in its dtype in the file.
  """
  arrays = {}
  for name, leaf in traverse_util.flatten_dict(dict(variables), sep='.').items():
    array = np.asarray(leaf, order='C')
    with np.errstate(over='ignore'):
      array = array.astype(dtype) if dtype is not None and array.ndim > 1 else array
    if not np.isfinite(array).all():
      raise ValueError(f'Parameter {name} holds values that are not finite in {array.dtype}.')
    arrays[name] = array
  metadata = dict(metadata or {}) | ({'probe': probe.to_json()} if probe else {})
  return safetensors.sort_metadata(safetensors_numpy.save(arrays, metadata=metadata))
