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

_TORCH_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'bias': 'bias',
                 'mean': 'running_mean', 'var': 'running_var'}
_CLASSIFIERS = ('fc', 'linear', 'classifier')  # Names of the last layer in different code bases.
_DOTS = r'(?<=\d)_|_(?=\d)|(?<=^backbone)_(?=conv|bn|layer|features)'


def to_variables(state_dict: Mapping[str, np.ndarray], module: nn.Module,
                 image_shape: tuple[int, ...]) -> dict[str, PyTree]:
  """Converts arrays in PyTorch's names and layout to the variables of a module.

  Transposes convolutions from OIHW to HWIO and dense layers from (out, in) to (in, out). Casts to
  the dtypes of `module.init`. Ignores `num_batches_tracked`. A last layer named fc, linear or
  classifier fits a module with another of these names. Arrays named 'params.conv1.kernel' and
  'batch_stats.bn1.mean' are in Flax's layout already. `image_shape` is the shape of one input:
  [H, W, C], or [Z] for a generator.

  Raises ValueError, which names the first array that is missing, unexpected, not floating-point,
  not finite, or of another shape.
  """
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  shapes = traverse_util.flatten_dict(dict(jax.eval_shape(module.init, jax.random.key(0), images)))
  if all(name.startswith(('params.', 'batch_stats.')) for name in state_dict):
    paths = {'.'.join(path): path for path in shapes}
    arrays = {name: (name, array) for name, array in state_dict.items()}
  else:
    paths = {f'{"_".join(path[1:-1])}.{_TORCH_LEAVES.get(path[-1], path[-1])}': path
             for path in shapes}
    arrays = _match_names(state_dict, paths)
  for key, (name, array) in arrays.items():
    if key not in paths:
      raise ValueError(f'Unexpected parameter {safe_name(name)} {array.shape}: '
                       f'{type(module).__name__} has none of this name.')
  variables = {}
  for key, path in paths.items():
    if key not in arrays:
      raise ValueError(
          f'Missing parameter {"/".join(path)} {shapes[path].shape}: the weights hold no {key}.')
    variables[path] = _cast(*arrays[key], shapes[path], getattr(module, 'num_classes', None))
  return traverse_util.unflatten_dict(variables)


def from_variables(variables: Mapping[str, PyTree]) -> dict[str, np.ndarray]:
  """Converts variables to a state dict for PyTorch's `load_state_dict`.

  An underscore next to a digit becomes a dot (`block1_layer_0` is `block1.layer.0`), as does the
  one after `backbone` in torchvision's names. Each batch norm gets a `num_batches_tracked` of 0.
  The names of an ESPNet are ours, not its authors': PyTorch's ESPNet cannot load them.
  """
  state_dict = {}
  for path, leaf in traverse_util.flatten_dict(dict(variables)).items():
    name = re.sub(_DOTS, '.', '.'.join(path[1:-1]))
    array = to_torch_layout(np.asarray(leaf), path[-1])
    state_dict[f'{name}.{_TORCH_LEAVES.get(path[-1], path[-1])}'] = np.asarray(array, order='C')
    if path[-1] == 'var':
      state_dict[f'{name}.num_batches_tracked'] = np.zeros((), np.int64)
  return state_dict


def to_torch_layout(array: np.ndarray, leaf: str) -> np.ndarray:
  """Moves the axes of kernels from (spatial ..., in, out) to (out, in, spatial ...)."""
  if leaf == 'depthwise_kernel':  # Of Keras: [H, W, C, M] to [C * M, 1, H, W].
    return array.transpose(2, 3, 0, 1).reshape(-1, 1, *array.shape[:2])
  return np.moveaxis(array, (-1, -2), (0, 1)) if leaf == 'kernel' and array.ndim > 1 else array


def _match_names(state_dict: Mapping[str, np.ndarray],
                 paths: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, np.ndarray]]:
  """Names in the file, and arrays in Flax's layout, by the keys of `paths`."""
  keys = {}
  for name in state_dict:
    layer, _, leaf = name.rpartition('.')
    if leaf != 'num_batches_tracked':
      keys[name] = f'{layer.replace(".", "_")}.{leaf}'
  theirs = {key.split('.')[0] for key in set(keys.values()) - set(paths)}
  ours = {key.split('.')[0] for key in set(paths) - set(keys.values())}
  if len(theirs) == len(ours) == 1 and (theirs | ours) <= set(_CLASSIFIERS):
    prefix, new = f'{theirs.pop()}.', f'{ours.pop()}.'
    keys = {name: new + key.removeprefix(prefix) if key.startswith(prefix) else key
            for name, key in keys.items()}
  arrays = {}
  for name, key in keys.items():
    if key in arrays:
      raise ValueError(f'Parameters {safe_name(arrays[key][0])} and {safe_name(name)} are both '
                       f'{safe_name(key)} of the network.')
    array = state_dict[name]
    if array.ndim > 1 and key in paths and paths[key][-1] == 'kernel':
      array = np.moveaxis(array, (0, 1), (-1, -2))
    arrays[key] = name, array
  return arrays


def _cast(name: str, array: np.ndarray, expected: jax.ShapeDtypeStruct,
          num_classes: int | None) -> jax.Array:
  """Checks an array and casts it. An error names both numbers of classes if only these differ."""
  start, shape = f'Parameter {safe_name(name)}', expected.shape
  if array.shape != shape:
    hint = ''
    if array.ndim and array.shape[:-1] == shape[:-1] and shape[-1:] == (num_classes,):
      hint = (f' The weights seem to have {array.shape[-1]} classes, the network {num_classes} '
              '(dataset.num_classes).')
    raise ValueError(f"{start} has the shape {array.shape}, must have {shape} (both in Flax's "
                     f'layout).{hint}')
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise ValueError(f'{start} is {array.dtype}, not floating-point.')
  with np.errstate(over='ignore', invalid='ignore'):
    array = array.astype(expected.dtype)
  if count := (~np.isfinite(array)).sum():
    raise ValueError(f'{start} holds {count} values that are not finite in {expected.dtype}.')
  return jnp.asarray(array)
