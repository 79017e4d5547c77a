"""Names and layouts in which other code bases publish weights, to those of PyTorch that `to_variables` takes."""

import collections
import re
from collections.abc import Callable, Mapping

import numpy as np

from dfkd_jax.messages import safe_name

_KERAS_LEAVES = {
    'kernel': 'weight', 'depthwise_kernel': 'weight', 'gamma': 'weight', 'beta': 'bias', 'bias': 'bias',
    'moving_mean': 'running_mean', 'moving_variance': 'running_var'}
_KERAS_DENSE = ('fc1000', 'predictions', 'probs')
_STAGE_OF_KERAS = {str(i): f'layer{i - 1}' for i in range(2, 6)}
_NUMBER = '0|[1-9][0-9]{0,5}'  # Of a block, as PyTorch writes it.
_BRANCHES = {'2a': '1', '2b': '2', '2c': '3'}


def translate(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Arrays in the names and layout of our models, from a dialect that their names give away.

  Known are, besides torchvision's and timm's own names, which pass as they are:

  * Keras, arrays '<layer>/<weight>' such as 'conv1/kernel': kernels turn from HWIO
    to OIHW, dense ones from (in, out) to (out, in). Layers of its ResNets become
    torchvision's, be they called 'res2a_branch2a' or 'conv2_block1_1_conv'.
  * The EfficientNets of lukemelas ('_blocks.3._expand_conv.weight'): become timm's
    ('blocks.2.0.conv_pw.weight'). A stage is where the channels change.

  Args:
    arrays: As `read` gives them.

  Raises:
    ValueError: If two arrays get the same name.
  """
  if is_keras(arrays):
    renamed = [(_keras_name(name), _keras_layout(name, array)) for name, array in arrays.items()]
  elif '_conv_stem.weight' in arrays:
    rename = _lukemelas_names(arrays)
    renamed = [(rename(name), array) for name, array in arrays.items()]
  else:
    return dict(arrays)
  found = dict(renamed)
  if len(found) < len(renamed):
    counts = collections.Counter(name for name, _ in renamed)
    twice = next(name for name, count in counts.items() if count > 1)
    raise ValueError(f'Two parameters are called {safe_name(twice)} once their names are translated.')
  return found


def is_keras(arrays: Mapping[str, np.ndarray]) -> bool:
  """Whether all names are '<layer>/<weight>' with a weight of Keras."""
  return bool(arrays) and all('/' in name and _split(name)[1] in _KERAS_LEAVES for name in arrays)


def _split(name: str) -> tuple[str, str]:
  """Layer and weight of 'conv1/kernel', and of 'conv1/conv1/kernel:0'."""
  *_, layer, leaf = name.split('/')
  return layer, leaf.removesuffix(':0')


def _keras_layout(name: str, array: np.ndarray) -> np.ndarray:
  leaf = _split(name)[1]
  if leaf == 'depthwise_kernel':  # [H, W, C, M], of which the outputs are C-major.
    return array.transpose(2, 3, 0, 1).reshape(-1, 1, *array.shape[:2])
  return np.moveaxis(array, (-1, -2), (0, 1)) if leaf == 'kernel' and array.ndim > 1 else array


def _keras_name(name: str) -> str:
  layer, leaf = _split(name)
  return f'{_keras_layer(layer)}.{_KERAS_LEAVES[leaf]}'


def _keras_layer(layer: str) -> str:
  """A layer of a ResNet by torchvision's name; another by its own."""
  if layer in _KERAS_DENSE:
    return 'fc'
  if layer in ('conv1_conv', 'conv1'):
    return 'conv1'
  if layer in ('bn_conv1', 'conv1_bn'):
    return 'bn1'
  if old := re.fullmatch(r'(res|bn)([2-5])([a-z])_branch(1|2[abc])', layer):
    kind, stage, letter, branch = old.groups()
    block, at, is_norm = ord(letter) - ord('a'), _BRANCHES.get(branch, '0'), kind == 'bn'
  elif new := re.fullmatch(r'conv([2-5])_block(\d+)_([0-3])_(conv|bn)', layer):
    stage, number, at, kind = new.groups()
    block, is_norm = int(number) - 1, kind == 'bn'
  else:
    return layer
  part = f'downsample.{int(is_norm)}' if at == '0' else f'{"bn" if is_norm else "conv"}{at}'
  return f'{_STAGE_OF_KERAS[stage]}.{block}.{part}'


def _lukemelas_names(arrays: Mapping[str, np.ndarray]) -> Callable[[str], str]:
  """From '<module>.<leaf>' to timm's name of it."""
  outside = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head', '_bn1': 'bn2', '_fc': 'classifier'}
  blocks, stage, block, last = {}, -1, 0, None
  numbers = {match[1] for name in arrays if (match := re.match(rf'_blocks\.({_NUMBER})\.', name))}
  for number in sorted(numbers, key=int):
    project = arrays.get(f'_blocks.{number}._project_conv.weight')
    channels = project.shape[:1] if project is not None else None
    stage, block = (stage, block + 1) if channels == last else (stage + 1, 0)
    blocks[number], last = f'blocks.{stage}.{block}', channels

  def inside(number: str, part: str) -> str:
    expands = f'_blocks.{number}._expand_conv.weight' in arrays
    parts = ({'_expand_conv': 'conv_pw', '_bn0': 'bn1', '_depthwise_conv': 'conv_dw', '_bn1': 'bn2',
              '_project_conv': 'conv_pwl', '_bn2': 'bn3'} if expands else
             {'_depthwise_conv': 'conv_dw', '_bn1': 'bn1', '_project_conv': 'conv_pw', '_bn2': 'bn2'})
    return f'{blocks[number]}.{parts.get(part, part)}'

  def rename(name: str) -> str:
    module, _, leaf = name.rpartition('.')
    if match := re.fullmatch(rf'_blocks\.({_NUMBER})\.(\w+)', module):
      return f'{inside(*match.groups())}.{leaf}'
    return f'{outside.get(module, module)}.{leaf}'

  return rename
