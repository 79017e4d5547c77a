"""Translates names and layouts of other code bases to PyTorch's, for `to_variables`."""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from dfkd_jax.messages import safe_name
from dfkd_jax.weights.torch_layout import to_torch_layout

_KERAS_LEAVES = {
    'kernel': 'weight', 'depthwise_kernel': 'weight', 'gamma': 'weight', 'beta': 'bias',
    'bias': 'bias', 'moving_mean': 'running_mean', 'moving_variance': 'running_var'}
_KERAS_LAYERS = {'fc1000': 'fc', 'predictions': 'fc', 'probs': 'fc', 'conv1_conv': 'conv1',
                 'bn_conv1': 'bn1', 'conv1_bn': 'bn1'}
_KERAS_BRANCHES = {'1': 0, '2a': 1, '2b': 2, '2c': 3}
_LUKEMELAS_LAYERS = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head',
                     '_bn1': 'bn2', '_fc': 'classifier'}
_LUKEMELAS_BLOCK = {'_expand_conv': 'conv_pw', '_bn0': 'bn1', '_depthwise_conv': 'conv_dw',
                    '_bn1': 'bn2', '_project_conv': 'conv_pwl', '_bn2': 'bn3'}
_LUKEMELAS_FIRST_BLOCK = {  # Does not expand.
    '_depthwise_conv': 'conv_dw', '_bn1': 'bn1', '_project_conv': 'conv_pw', '_bn2': 'bn2'}


def translate_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Translates arrays to the names and layout of our models; no two may get the same name.

  Names give the scheme away. Known, besides the names of torchvision and timm, which stay:

  * Keras, '<layer>/<weight>' such as 'conv1/kernel': transposes kernels from HWIO to OIHW and from
    (in, out) to (out, in). Layers of its ResNets, such as 'res2a_branch2a' or
    'conv2_block1_1_conv', get torchvision's names.
  * The EfficientNets of lukemelas, '_blocks.3._expand_conv.weight': get timm's names
    ('blocks.2.0.conv_pw.weight'). A stage begins where the number of channels changes.
  * ESPNet, whose down-samplers 'level2_0' would clash with the blocks 'level2.0': 'down2'.
  """
  keras = {name: name.removesuffix(':0').split('/')[-2:] for name in arrays}
  if arrays and all(len(end) == 2 and end[1] in _KERAS_LEAVES for end in keras.values()):
    names = [f'{_keras_layer(layer)}.{_KERAS_LEAVES[leaf]}' for layer, leaf in keras.values()]
    arrays = {name: to_torch_layout(arrays[name], leaf) for name, (_, leaf) in keras.items()}
  elif '_conv_stem.weight' in arrays:
    names = _lukemelas_names(arrays)
  elif any(re.search(r'\bdown[23]\.', name) for name in arrays):  # Our own ESPNet.
    names = list(arrays)
  else:
    names = [re.sub(r'\blevel([23])_0\.', r'down\1.', name) for name in arrays]
  olds = {}
  for old, new in zip(arrays, names, strict=True):
    if olds.setdefault(new, old) != old:
      raise ValueError(
          f'Parameters {safe_name(olds[new])} and {safe_name(old)} are both {safe_name(new)}.')
  return dict(zip(olds, arrays.values(), strict=True))


def _keras_layer(layer: str) -> str:
  """Torchvision's name of a layer of a ResNet; other layers keep theirs."""
  if old := re.fullmatch(r'(res|bn)([2-5])([a-z])_branch(1|2[abc])', layer):
    kind, stage, letter, branch = old.groups()
    block, index = ord(letter) - ord('a'), _KERAS_BRANCHES[branch]
  elif new := re.fullmatch(r'conv([2-5])_block(\d+)_([0-3])_(conv|bn)', layer):
    stage, number, index, kind = new.groups()
    block, index = int(number) - 1, int(index)
  else:
    return _KERAS_LAYERS.get(layer, layer)
  is_norm = kind == 'bn'
  part = f'{"bn" if is_norm else "conv"}{index}' if index else f'downsample.{int(is_norm)}'
  return f'layer{int(stage) - 1}.{block}.{part}'


def _lukemelas_names(arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
  """Timm's names of the arrays."""
  blocks, stage, block, channels = {}, -1, 0, None
  numbers = {match[1] for name in arrays if (match := re.match(r'_blocks\.(\d+)\.', name))}
  for number in sorted(numbers, key=int):
    project = arrays.get(f'_blocks.{number}._project_conv.weight')
    before, channels = channels, project.shape[:1] if project is not None else None
    stage, block = (stage, block + 1) if channels == before else (stage + 1, 0)
    blocks[number] = f'blocks.{stage}.{block}'
  for name in arrays:
    layer, _, leaf = name.rpartition('.')
    if match := re.fullmatch(r'_blocks\.(\d+)\.(\w+)', layer):
      number, part = match.groups()
      expands = f'_blocks.{number}._expand_conv.weight' in arrays
      parts = _LUKEMELAS_BLOCK if expands else _LUKEMELAS_FIRST_BLOCK
      yield f'{blocks[number]}.{parts.get(part, part)}.{leaf}'
    else:
      yield f'{_LUKEMELAS_LAYERS.get(layer, layer)}.{leaf}'
