"""The networks of the published code's reference values, and between its layout and ours."""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from conftest import HERE, SHARED, golden
from flax import linen as nn
from flax import traverse_util

from dfkd_jax import models, tasks, weights

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def cast(tree):
  """The default float type: under `x64` Linen still gives float32."""
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), tree)


@functools.cache
def wide_resnet(name):
  module = models.create('wrn16_1', 10)
  return models.bind(
      module, weights.to_variables(golden(name), module, (32, 32, 3)), mean=MEAN, std=STD)


def below(archive, prefix):
  return {
      key.removeprefix(prefix): value for key, value in archive.items() if key.startswith(prefix)}


def parameters(arrays, generator, latent_shape, start):
  """Variables of a generator, from PyTorch's layout; unread running moments from `start`."""
  running = {key: value for key, value in start.items() if '.running_' in key}
  return cast(weights.to_variables({**running, **arrays}, generator, latent_shape)['params'])


def torch_layout(params):
  return weights.from_variables({'params': params})


def labels_of(targets):
  return tasks.classification(10)._replace(sample_labels=lambda *_: jnp.asarray(targets, jnp.int32))


LAYERS = ('conv1', 'bn1', 'conv2', 'bn2', 'fc')
BLOCKS = ('l1_0', *(f'conv_blocks_{i}' for i in (0, 2, 3, 6, 7, 9)))


def formula_reference():
  """Its numbers, by method."""
  name = 'golden/fastdfkd_float64.json'
  path = SHARED / name if (SHARED / name).exists() else HERE / name
  return json.loads(path.read_text())


class Plain(nn.Module):
  """A user's own network of stock layers; nothing of the library is in it."""

  widths: tuple[int, int]
  num_classes: int = 4

  @nn.compact
  def __call__(self, x, train: bool = False):
    for i, (width, strides) in enumerate(zip(self.widths, (1, 2), strict=True), 1):
      x = nn.Conv(width, (3, 3), strides, padding=1, use_bias=False, name=f'conv{i}')(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, epsilon=1e-5, name=f'bn{i}')(x))
    x = x.mean((1, 2))
    self.sow('intermediates', 'features', x)
    return nn.Dense(self.num_classes, name='fc')(x)


def sequence(shape, index, scale, offset=0.0):
  j = np.arange(1, np.prod(shape) + 1)
  return (offset + scale * np.sin(0.37 * j + 0.71 * index)).reshape(shape)


def filled(module, shape, layers, base):
  """Variables by the closed formula, which counts in PyTorch's layout."""
  shapes = traverse_util.flatten_dict(
      jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape))))
  order = [('params', layer, leaf) for layer in layers for leaf in ('kernel', 'scale', 'bias')]
  flat = {}
  for i, path in enumerate(path for path in order if path in shapes):
    shape = shapes[path].shape
    if path[-1] == 'kernel':
      values = sequence((shape[-1], shape[-2], *shape[:-2]), base + i, 0.5)
      flat[path] = np.moveaxis(values, (0, 1), (-1, -2))
    else:
      flat[path] = sequence(shape, base + i, *((0.1, 1.0) if path[-1] == 'scale' else (0.5,)))
  normed = [layer for layer in layers if ('batch_stats', layer, 'mean') in shapes]
  for r, layer in enumerate(normed):
    size = shapes['batch_stats', layer, 'mean'].shape
    flat['batch_stats', layer, 'mean'] = sequence(size, base + 20 + r, 0.2)
    flat['batch_stats', layer, 'var'] = sequence(size, base + 30 + r, 0.3, 1.0)
  assert set(flat) == set(shapes)
  return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat))


def formula_network(widths, base):
  """The teacher has widths (6, 8) and base 0, the student (4, 5) and 6."""
  return models.bind(
      Plain(widths), filled(Plain(widths), (8, 8, 3), LAYERS, base), mean=(0.5, 0.4, 0.3),
      std=(0.25, 0.2, 0.3))


def check_formula(params, reference, message=''):
  """Sum, norm and first number of each parameter of a generator."""
  arrays = torch_layout(params)
  for key, numbers in reference.items():
    np.testing.assert_allclose(
        [arrays[key].sum(), np.linalg.norm(arrays[key]), arrays[key].ravel()[0]],
        [numbers[of] for of in ('sum', 'l2', 'first')], rtol=1e-9, err_msg=f'{key} {message}')


def shapes_of(module, input_shape=(32, 32, 3)):
  return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *input_shape)))


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def recipe(state_dict, gain):
  """Weights of zoo_forward: one random stream for each name."""
  weights = {}
  for name, shape in state_dict:
    noise = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(
        shape).astype(np.float32)
    if name.endswith('num_batches_tracked'):
      weights[name] = np.zeros((), np.int64)
    elif name.endswith('running_var'):
      weights[name] = np.exp(np.float32(0.2) * noise)
    elif name.endswith('weight') and len(shape) == 1:
      weights[name] = 1 + np.float32(0.1) * noise
    elif len(shape) < 2:
      weights[name] = np.float32(0.1) * noise
    else:
      weights[name] = noise * np.float32(np.sqrt(gain / np.prod(shape[1:])))
  return weights


def nhwc(images):
  return images.transpose(0, 2, 3, 1)


def drawn_variables(module, input_shape):
  """Variables drawn by NumPy, which saves compiling `init`."""
  rng = np.random.default_rng(0)
  draw = lambda path, s: jnp.asarray(
      rng.normal(size=s.shape) / np.sqrt(np.prod(s.shape[:-1])) if len(s.shape) > 1
      else np.full(s.shape, float(path[-1].key in ('scale', 'var'))), s.dtype)
  return jax.tree_util.tree_map_with_path(draw, shapes_of(module, input_shape))


def program(make):
  """Compiles (state, latents, targets, teacher, student) -> (state, metrics)."""

  def call(state, latents, targets, teacher, student):
    return make(latents, targets).synthesize(state, jax.random.key(0), teacher, student)

  return jax.jit(call)


def check_images(kept, reference):
  """The buffer holds floor(255 x), like the published folder of PNGs; x is float32."""
  scaled = 255 * np.asarray(reference, np.float64).transpose(0, 2, 3, 1)
  # Rounding of the stored x, 6e-8, may cross an integer.
  tolerance = np.abs(scaled - np.round(scaled)) < 1e-4
  assert np.abs(kept.astype(int) - np.floor(scaled).astype(int))[~tolerance].max() == 0
  assert np.abs(kept.astype(int) - np.floor(scaled).astype(int)).max() <= 1
