"""Converts between PyTorch's state dicts and Flax's variables.

The models are named after PyTorch's. One rule serves all: the path of a Flax module, joined by '_',
is the name of the PyTorch module with '_' for '.' (`layer1_0/conv1` is `layer1.0.conv1`).
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dfkd_jax.messages import safe_name
from dfkd_jax.types import PyTree

_TORCH_LEAVES = {
    'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'bias': 'bias',
    'mean': 'running_mean', 'var': 'running_var'}
_CLASSIFIERS = ('fc', 'linear', 'classifier')  # Names of the last layer in different code bases.
_Named = tuple[str, np.ndarray]  # The name in the file, and the array.


class ShapeError(ValueError):
  """An array has another shape than the module expects; both in Flax's layout."""

  def __init__(self, name: str, stored: tuple[int, ...], expected: tuple[int, ...]):
    super().__init__(f'Parameter {safe_name(name)} has the shape {stored}, must have {expected} '
                     "(both in Flax's layout).")
    self.stored, self.expected = stored, expected


def to_variables(
    state_dict: Mapping[str, np.ndarray], module: nn.Module, image_shape: tuple[int, ...]
) -> dict[str, PyTree]:
  """Converts arrays in PyTorch's names and layout to the variables of a module.

  Transposes convolutions from OIHW to HWIO and dense layers from (out, in) to (in, out). Casts to
  the dtypes of `module.init`. Ignores `num_batches_tracked`. A last layer named fc, linear or
  classifier fits a module with another of these names.

  Args:
    state_dict: Arrays from `read`.
    module: A module named by the rule above.
    image_shape: Shape of its input without the batch: [H, W, C], or [Z] for a generator.

  Raises:
    ValueError: An array is missing, unexpected, duplicate, not floating-point, not finite, or of
      another shape. Names the first one.
  """
  expected = {_torch_key(path): (path, leaf) for path, leaf in _shapes(module, image_shape).items()}
  arrays = {
      key: (name, _to_flax(array, expected[key][0][-1]) if key in expected else array)
      for key, (name, array) in _match_names(state_dict, set(expected)).items()}
  return _fill(arrays, expected, module)


def from_variables(variables: Mapping[str, PyTree]) -> dict[str, np.ndarray]:
  """Converts variables to a state dict for PyTorch's `load_state_dict`.

  An underscore next to a digit becomes a dot (`block1_layer_0` is `block1.layer.0`). Each batch
  norm gets a `num_batches_tracked` of 0.
  """
  state_dict = {}
  for path, leaf in traverse_util.flatten_dict(dict(variables)).items():
    name = re.sub(r'(?<=\d)_|_(?=\d)', '.', '.'.join(path[1:-1]))
    state_dict[f'{name}.{_TORCH_LEAVES.get(path[-1], path[-1])}'] = _to_torch(leaf, path[-1])
    if path[-1] == 'var':
      state_dict[f'{name}.num_batches_tracked'] = np.zeros((), np.int64)
  return state_dict


def unflatten_variables(
    arrays: Mapping[str, np.ndarray], module: nn.Module, image_shape: tuple[int, ...]
) -> dict[str, PyTree]:
  """Nests arrays in Flax's layout, named 'params.conv1.kernel' and so on. See `to_variables`."""
  expected = {'.'.join(path): (path, leaf) for path, leaf in _shapes(module, image_shape).items()}
  return _fill({name: (name, array) for name, array in arrays.items()}, expected, module)


def _shapes(
    module: nn.Module, image_shape: tuple[int, ...]) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  return traverse_util.flatten_dict(dict(jax.eval_shape(module.init, jax.random.key(0), images)))


def _fill(
    arrays: Mapping[str, _Named],
    expected: Mapping[str, tuple[tuple[str, ...], jax.ShapeDtypeStruct]],
    module: nn.Module,
) -> dict[str, PyTree]:
  """Makes variables of arrays in Flax's layout; all keys must match."""
  for key, (name, array) in arrays.items():
    if key not in expected:
      raise ValueError(f'Unexpected parameter {safe_name(name)} {array.shape}: '
                       f'{type(module).__name__} has none of this name.')
  variables = {}
  for key, (path, leaf) in expected.items():
    if key not in arrays:
      raise ValueError(
          f'Missing parameter {"/".join(path)} {leaf.shape}: the weights hold no {key}.')
    variables[path] = _cast(*arrays[key], leaf)
  return traverse_util.unflatten_dict(variables)


def _torch_key(path: tuple[str, ...]) -> str:
  return f'{"_".join(path[1:-1])}.{_TORCH_LEAVES.get(path[-1], path[-1])}'


def _match_names(state_dict: Mapping[str, np.ndarray], expected: set[str]) -> dict[str, _Named]:
  """Arrays by `_torch_key`, with the module's name of the last layer."""
  keys = {}
  for name in state_dict:
    layer, _, leaf = name.rpartition('.')
    if leaf != 'num_batches_tracked':
      keys[name] = f'{layer.replace(".", "_")}.{leaf}'
  theirs = {key.split('.')[0] for key in set(keys.values()) - expected}
  ours = {key.split('.')[0] for key in expected - set(keys.values())}
  if len(theirs) == len(ours) == 1 and (theirs | ours) <= set(_CLASSIFIERS):
    prefix, new = f'{theirs.pop()}.', f'{ours.pop()}.'
    keys = {name: new + key.removeprefix(prefix) if key.startswith(prefix) else key
            for name, key in keys.items()}
  arrays = {}
  for name, key in keys.items():
    if key in arrays:
      raise ValueError(f'Parameters {safe_name(arrays[key][0])} and {safe_name(name)} are both '
                       f'{safe_name(key)} of the network.')
    arrays[key] = name, state_dict[name]
  return arrays


def _to_flax(array: np.ndarray, leaf: str) -> np.ndarray:
  """(out, in, spatial ...) to (spatial ..., in, out) for kernels, also depthwise ones."""
  return np.moveaxis(array, (0, 1), (-1, -2)) if leaf == 'kernel' and array.ndim > 1 else array


def _to_torch(array: jax.Array, leaf: str) -> np.ndarray:
  array = np.asarray(array)
  array = np.moveaxis(array, (-1, -2), (0, 1)) if leaf == 'kernel' and array.ndim > 1 else array
  return np.asarray(array, order='C')


def _cast(name: str, array: np.ndarray, expected: jax.ShapeDtypeStruct) -> jax.Array:
  if array.shape != expected.shape:
    raise ShapeError(name, array.shape, expected.shape)
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise ValueError(f'Parameter {safe_name(name)} is {array.dtype}, not floating-point.')
  with np.errstate(over='ignore', invalid='ignore'):
    array = array.astype(expected.dtype)
  if count := (~np.isfinite(array)).sum():
    raise ValueError(f'Parameter {safe_name(name)} holds {count} values that are not finite in '
                     f'{expected.dtype}.')
  return jnp.asarray(array)
