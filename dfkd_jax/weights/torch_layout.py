"""Between PyTorch's state dicts and Flax's variables.

The models are named after PyTorch's, so that one rule serves all: the path of a
Flax module, joined by '_', is the name of the PyTorch module with '_' for '.'
(`layer1_0/conv1` is `layer1.0.conv1`).
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
_CLASSIFIERS = ('fc', 'linear', 'classifier')  # The last layer's name differs between code bases.


class ShapeError(ValueError):
  """An array has another shape than the module wants; both in the layout of Flax."""

  def __init__(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]):
    super().__init__(
        f'Parameter {safe_name(name)} has the shape {found} where {wanted} is wanted (both in the layout of Flax).')
    self.found, self.wanted = found, wanted


def to_variables(
    state_dict: Mapping[str, np.ndarray], module: nn.Module, image_shape: tuple[int, ...]
) -> dict[str, PyTree]:
  """Variables of a module from arrays in PyTorch's names and layout.

  Convolutions turn from OIHW to HWIO, dense layers from (out, in) to (in, out);
  all take the dtypes of `module.init`. `num_batches_tracked` is ignored. A last
  layer called fc, linear or classifier fits a module that calls it otherwise.

  Args:
    state_dict: As `read` gives it.
    module: Whose names follow the rule above.
    image_shape: Of its input without the batch, [H, W, C], or [Z] for a generator.

  Raises:
    ValueError: For the first array that the module lacks, that the file lacks,
      that has another shape, that is there twice, or that is not finite or not floating-point.
  """
  expected = _expected(module, image_shape)
  by_torch_name = {_torch_key(path): path for path in expected}
  arrays = _renamed(state_dict, by_torch_name)
  for key, (name, array) in arrays.items():
    if key not in by_torch_name:
      raise ValueError(
          f'Unexpected parameter {safe_name(name)} {array.shape}: {type(module).__name__} has none of that name.')
  flat = {}
  for key, path in by_torch_name.items():
    if key not in arrays:
      raise ValueError(f'Missing parameter {"/".join(path)} {expected[path].shape}: '
                       f'the weights hold none called {key}, with "." for some "_".')
    name, array = arrays[key]
    flat[path] = _fitted(name, _to_flax(array, path[-1]), expected[path])
  return traverse_util.unflatten_dict(flat)


def from_variables(variables: Mapping[str, PyTree]) -> dict[str, np.ndarray]:
  """The inverse of `to_variables`, for PyTorch's `load_state_dict`.

  An underscore beside a digit becomes a dot (`block1_layer_0` is
  `block1.layer.0`, `conv_blocks_3` is `conv_blocks.3`). Each batch norm gets a
  `num_batches_tracked` of 0.
  """
  state_dict = {}
  for path, leaf in traverse_util.flatten_dict(dict(variables)).items():
    module = re.sub(r'(?<=\d)_|_(?=\d)', '.', '.'.join(path[1:-1]))
    state_dict[f'{module}.{_TORCH_LEAVES.get(path[-1], path[-1])}'] = _to_torch(np.asarray(leaf), path[-1])
    if path[-1] == 'var':
      state_dict[f'{module}.num_batches_tracked'] = np.zeros((), np.int64)
  return state_dict


def from_flat(arrays: Mapping[str, np.ndarray], module: nn.Module, image_shape: tuple[int, ...]) -> dict[str, PyTree]:
  """Variables from arrays in Flax's layout, called 'params.conv1.kernel' and so on.

  Raises:
    ValueError: As `to_variables`.
  """
  expected = {'.'.join(path): (path, leaf) for path, leaf in _expected(module, image_shape).items()}
  for name, array in arrays.items():
    if name not in expected:
      raise ValueError(
          f'Unexpected parameter {safe_name(name)} {array.shape}: {type(module).__name__} has none of that name.')
  flat = {}
  for name, (path, leaf) in expected.items():
    if name not in arrays:
      raise ValueError(f'Missing parameter {name} {leaf.shape}: the weights hold none of that name.')
    flat[path] = _fitted(name, arrays[name], leaf)
  return traverse_util.unflatten_dict(flat)


def _expected(module: nn.Module, image_shape: tuple[int, ...]) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
  shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
  return traverse_util.flatten_dict(dict(shapes))


def _torch_key(path: tuple[str, ...]) -> str:
  return f'{"_".join(path[1:-1])}.{_TORCH_LEAVES.get(path[-1], path[-1])}'


def _renamed(
    state_dict: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, np.ndarray]]:
  """Arrays, and their own names, by `_torch_key`."""
  arrays = {}
  for name, array in state_dict.items():
    module, _, leaf = name.rpartition('.')
    key = f'{module.replace(".", "_")}.{leaf}'
    if leaf != 'num_batches_tracked':
      _add(arrays, key, name, array)
  theirs = {key.split('.')[0] for key in arrays.keys() - wanted.keys()}
  ours = {key.split('.')[0] for key in wanted.keys() - arrays.keys()}
  if len(theirs) == len(ours) == 1 and (theirs | ours) <= set(_CLASSIFIERS):
    old, new = f'{theirs.pop()}.', f'{ours.pop()}.'
    arrays, before = {}, arrays
    for key, (name, array) in before.items():
      _add(arrays, new + key.removeprefix(old) if key.startswith(old) else key, name, array)
  return arrays


def _add(arrays: dict[str, tuple[str, np.ndarray]], key: str, name: str, array: np.ndarray) -> None:
  if key in arrays:
    raise ValueError(f'Parameters {safe_name(arrays[key][0])} and {safe_name(name)} are the same one, {safe_name(key)}, of ours.')
  arrays[key] = name, array


def _to_flax(array: np.ndarray, leaf: str) -> np.ndarray:
  """(out, in, spatial ...) to (spatial ..., in, out) for kernels, depthwise ones too."""
  return np.moveaxis(array, (0, 1), (-1, -2)) if leaf == 'kernel' and array.ndim > 1 else array


def _to_torch(array: np.ndarray, leaf: str) -> np.ndarray:
  array = np.moveaxis(array, (-1, -2), (0, 1)) if leaf == 'kernel' and array.ndim > 1 else array
  return np.asarray(array, order='C')


def _fitted(name: str, array: np.ndarray, expected: jax.ShapeDtypeStruct) -> jax.Array:
  if array.shape != expected.shape:
    raise ShapeError(name, array.shape, expected.shape)
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise ValueError(f'Parameter {safe_name(name)} is {array.dtype}, not floating-point.')
  with np.errstate(over='ignore', invalid='ignore'):
    converted = array.astype(expected.dtype)
  if not np.isfinite(converted).all():
    raise ValueError(f'Parameter {safe_name(name)} holds {np.size(converted) - np.isfinite(converted).sum()} '
                     f'values that are not finite in {expected.dtype}.')
  return jnp.asarray(converted)
