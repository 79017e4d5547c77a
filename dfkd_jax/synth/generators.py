"""Generators of images: drawing their variables, rendering, checks of shapes, redrawing."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from dfkd_jax.messages import FieldError
from dfkd_jax.models.network import Network
from dfkd_jax.synth.objective import Factors
from dfkd_jax.types import Array, Outputs, PRNGKey, PyTree


def init(generator: nn.Module, key: PRNGKey, latent_shape: tuple[int, ...]) -> PyTree:
  """Draws the variables of a generator for latents [B, ...], in the default float type."""
  variables = jax.jit(lambda k: generator.init(k, jnp.zeros(latent_shape)))(key)
  # Linen gives float32 under `jax_enable_x64` too; optimizer states would inherit it.
  return jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), variables)


def render(generator: nn.Module, params: PyTree, latents: Array) -> Array:
  """Renders images [B, H, W, C] in (0, 1), normalised by this batch.

  Running moments are neither read nor kept. A generator of your own takes `train=` beside the
  latents, and names its `first_layers` if they are to be reset.
  """
  images, _ = generator.apply({'params': params}, latents, train=True, mutable=['batch_stats'])
  return images


def check(
    generator: nn.Module, params: PyTree, latent_shape: tuple[int, ...],
    image_shape: tuple[int, ...], teacher: Network, num_classes: int, factors: Factors) -> Outputs:
  """Checks that all parts fit; returns the shapes of the teacher's outputs. Computes nothing.

  Raises a ValueError if the images are not `image_shape`, or as `check_teacher` does.
  """
  images = jax.eval_shape(lambda p, z: render(generator, p, z), params, jnp.zeros(latent_shape))
  if images.shape[1:] != tuple(image_shape):
    raise FieldError('image_shape', f'image_shape is {tuple(image_shape)}, must be '
                     f'{images.shape[1:]}, the shape of the images that the generator makes.')
  return check_teacher(teacher, images, num_classes, factors)


def check_teacher(
    teacher: Network, images: Array, num_classes: int, factors: Factors) -> Outputs:
  """Returns the shapes of the teacher's outputs.

  Raises a ValueError if the teacher has another number of classes than the task, or a term matches
  moments that the teacher lacks or that cannot be captured.
  """
  outputs = jax.eval_shape(lambda network, x: network(x), teacher, images)
  if outputs.logits.shape[-1] != num_classes:
    raise ValueError(f'The task has {num_classes} classes, must have {outputs.logits.shape[-1]} '
                     'like the teacher.')
  for term in ('batch_norm', 'relative_batch_norm'):
    if factors.active(term) and not teacher.running():
      raise FieldError(f'factors.{term}', f'The teacher has no BatchNorm: the term {term} has '
                       'nothing to match, its factor must be 0.')
    if factors.active(term):
      teacher.check_moments(outputs.moments)
  return outputs


def redraw(key: PRNGKey, params: PyTree, std: float = 0.02,
           layers: tuple[str, ...] | None = None) -> PyTree:
  """Draws a generator anew: kernels from N(0, std^2), scales from N(1, std^2), biases 0.

  `layers` names the layers to draw; None: all. CMI does this before each batch (arXiv:2105.08584,
  its code). FastDFKD's code does it once, late in a run, for the first layers only, with scales
  from N(0, std^2).
  """
  flat = traverse_util.flatten_dict(params)
  names = sorted({path[0] for path in flat})
  if unknown := sorted(set(layers or ()).difference(names)):
    raise ValueError(f'The generator has no layers {unknown} to redraw, only {names}.')
  chosen = sorted(path for path in flat if layers is None or path[0] in layers)
  for path, path_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
    leaf, centre = flat[path], 1 if layers is None and path[-1] == 'scale' else 0
    noise = std * jax.random.normal(path_key, leaf.shape, leaf.dtype)
    flat[path] = jnp.zeros_like(leaf) if path[-1] == 'bias' else centre + noise
  return traverse_util.unflatten_dict(flat)
