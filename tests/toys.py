"""Networks, a generator and a task so small that a program of them compiles in seconds."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax import augment, models, synth, tasks

IMAGE = (12, 8, 3)
CLASSES = 5
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
# Half the time of a compilation is spent on making programs fast that run for milliseconds.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def variables(key, module):
  """With drawn running moments: those of `init`, 0 and 1, would hide mistakes."""
  found = module.init(key, jnp.zeros((1, *IMAGE)))

  def draw(path, leaf):
    noise = jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape)
    return 0.3 * noise if path[-1].key == 'mean' else jnp.exp(noise / 3)

  return {
      'params': found['params'],
      'batch_stats': jax.tree_util.tree_map_with_path(draw, found['batch_stats'])}


@functools.cache
def teacher():
  """Its last layer is scaled so that a generator's first images fall into several classes."""
  module = models.ConvNet(CLASSES, widths=(3, 6), strides=(1, 2))

  @jit
  def scaled(key, key_params, key_latents):
    found = variables(key, module)
    latents = jax.random.normal(key_latents, (64, 7))
    images, _ = package_generator().apply(
        package_generator().init(key_params, latents), latents, mutable=['batch_stats'])
    logits = models.bind(module, found, mean=MEAN, std=STD)(images).logits
    last, spread = found['params']['fc'], 2 / logits.std(0)
    found['params']['fc'] = {
        'kernel': spread * last['kernel'], 'bias': spread * (last['bias'] - logits.mean(0))}
    return found

  # The first caller may be in a trace or outside one.
  with jax.enable_x64(False), jax.ensure_compile_time_eval():
    return models.bind(module, scaled(*jax.random.split(jax.random.key(0), 3)), mean=MEAN, std=STD)


class Plain(nn.Module):
  """No convolution and no batch norm."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(CLASSES)(x.mean((1, 2)))


def teacher_without_batch_norm():
  return models.create_network(Plain(), jax.random.key(0), IMAGE)


@functools.cache
def student():
  """So close to the teacher that they agree on some images, as the adversary needs."""
  return teacher().replace(params=nudged(teacher().params))


def nudged(params):
  shift = lambda leaf: leaf * (1 + 0.02 * jnp.cos(jnp.arange(leaf.size))).reshape(leaf.shape)
  with jax.enable_x64(False), jax.ensure_compile_time_eval():
    return jax.tree.map(shift, params)


class Dense(nn.Module):
  """One class a pixel, at half the resolution and back."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(4, (3, 3), 2, padding=1, use_bias=False)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name='bn')(x))
    x = nn.Conv(CLASSES, (1, 1))(x)
    return x.repeat(2, 1).repeat(2, 2)


@functools.cache
def dense_teacher():
  """Logits [B, H, W, K]."""
  with jax.enable_x64(False), jax.ensure_compile_time_eval():
    return models.bind(
        Dense(), jit(lambda key: variables(key, Dense()))(jax.random.key(5)), mean=MEAN, std=STD)


@functools.cache
def dense_student():
  """As close to it as `student` to `teacher`."""
  return dense_teacher().replace(params=nudged(dense_teacher().params))


def float64(tree):
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def distances(tree, other):
  """By tensor: how far the two lie apart, as a share of the norm of the second."""
  apart = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
  return {jax.tree_util.keystr(path): apart(a, b) for (path, a), b in zip(
      jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True)}


class Generator(nn.Module):
  """A dense layer, a batch norm and a convolution, which compile faster than the package's."""

  first_layers: ClassVar = ('Dense_0',)
  width: int

  @nn.compact
  def __call__(self, latents, train: bool = True):
    height, width = IMAGE[0] // 2, IMAGE[1] // 2
    maps = nn.Dense(height * width * self.width)(latents)
    maps = maps.reshape(-1, height, width, self.width)
    maps = nn.relu(nn.BatchNorm(not train, momentum=0.9)(maps))
    return nn.sigmoid(nn.Conv(3, (3, 3))(maps.repeat(2, 1).repeat(2, 2)))


def generator(width=2):
  return Generator(width)


def package_generator(width=2):
  return models.Generator(image_shape=IMAGE, width=width)


class Maps(nn.Module):
  """Generate images from latents [B, h, w, Z] at a multiple of their size, without batch norm."""

  @nn.compact
  def __call__(self, latents, train: bool = True):
    scale = [size // own for size, own in zip(IMAGE, latents.shape[1:3], strict=False)]
    return nn.sigmoid(nn.Conv(3, (3, 3))(latents).repeat(scale[0], 1).repeat(scale[1], 2))


def fast_dfkd(**changes):
  """FastDFKD of three inner steps on four images; `changes` are arguments of the constructor."""
  return synth.create('fast_dfkd', **{
      'generator': generator(), 'image_shape': IMAGE, 'task': tasks.classification(CLASSES),
      'factors': synth.Factors(one_hot=0.5, batch_norm=2.0, adversarial=1.0), 'num_steps': 3,
      'latent_dim': 7, 'batch_size': 4, 'sample_batch_size': 6, 'capacity': 12,
      'adversarial_after': 0, 'augment': augment.identity, **changes})
