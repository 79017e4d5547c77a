"""NAYER: the classes are the generator's input, and the randomness is a layer that is drawn anew for each batch.

FastDFKD's inner loop with other latents. A constant embedding of each class, such
as a language model's of its name, goes through a noisy layer, which is a random
linear map, into the generator. Noisy layers are drawn afresh in every call and
move with the generator in its inner steps; each serves one image of every class.
The generator goes on from call to call, and is drawn anew every so many.

References:
  Tran et al., NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free
  Knowledge Distillation, CVPR 2024, https://arxiv.org/abs/2310.00258, and its published program for numbers. Written
  from notes on both; trajectories were not compared. There, a batch norm comes before the noisy layers, with a scale
  and a shift that live as long as the generator; here, it has neither, since a linear map follows.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dfkd_jax import tasks
from dfkd_jax.synth import buffered
from dfkd_jax.synth import inversion as inversions
from dfkd_jax.synth.synthesizer import Synthesizer, passes_on
from dfkd_jax.types import Array, PRNGKey

State = inversions.State


class NoisyLayers(struct.PyTreeNode):
  """Dense layers, one for every so many images as there are classes."""

  kernel: Array  # [L, E, Z]
  bias: Array  # [L, Z]


def draw_layers(key: PRNGKey, number: int, size: int, latent_dim: int) -> NoisyLayers:
  """Noisy layers [number] for embeddings of `size` numbers: kernels from N(0, 1), biases 0."""
  kernel = jax.random.normal(key, (number, size, latent_dim))
  return NoisyLayers(kernel, jnp.zeros((number, latent_dim), kernel.dtype))


def normalised(embeddings: Array, epsilon: float = 1e-5) -> Array:
  """Embeddings [K, E] less their mean, over their deviation: a batch norm where all classes are equally frequent."""
  return (embeddings - embeddings.mean(0)) * jax.lax.rsqrt(embeddings.var(0) + epsilon)


def latents_of(layers: NoisyLayers, labels: Array, embeddings: Array) -> Array:
  """Latents [B, Z] of images of classes `labels` [B]; the n-th of a class comes by the n-th noisy layer.

  Args:
    layers: As many as there are images of the commonest class, else two of them are the same.
    labels: [B] int32.
    embeddings: [K, E], normalised.
  """
  latents = jnp.einsum('ke,lez->lkz', embeddings, layers.kernel) + layers.bias[:, None]
  so_far = jnp.cumsum(jax.nn.one_hot(labels, embeddings.shape[0], dtype=jnp.int32), axis=0)
  turn = jnp.take_along_axis(so_far, labels[:, None], axis=1)[:, 0] - 1
  return latents[turn, labels]


def checked(embeddings: Any, classes: int) -> np.ndarray:
  """One embedding for each class, [K, E]; one-hot if there is none."""
  if embeddings is None:
    return np.eye(classes)
  found = np.asarray(embeddings)
  if found.ndim != 2 or found.shape[0] != classes or not found.shape[1]:
    raise ValueError(f'embeddings are {found.shape}, must be ({classes}, E): one for each class.')
  if not np.isfinite(found).all():
    raise ValueError('embeddings are not all finite, must be.')
  if len(np.unique(found, axis=0)) < classes:
    raise ValueError('embeddings of two classes are the same, must differ.')
  return found


@passes_on(
    inversions.loop,
    without=('ask', 'modulate', 'companion_terms', 'sample_latents', 'read', 'carry_latents', 'restart_every'))
def nayer(
    *,
    image_shape: tuple[int, int, int],
    task: tasks.Task,
    embeddings: Array | None = None,
    num_steps: int = 40,
    latent_dim: int | tuple[int, ...] = 1_000,
    generator_lr: float = 4e-3,
    latent_lr: float | None = None,
    meta: str = 'reinit',
    redraw_every: int | None = 20,
    redraw_std: float | None = None,
    adversarial_after: int = 200,
    capacity: int = 160_000,
    num_tasks: int = 1,
    axis: str | None = None,
    **numbers: Any,
) -> Synthesizer:
  """Makes the NAYER synthesizer; defaults are the published ones for CIFAR-100.

  Args:
    image_shape: [H, W, C].
    task: Must have classes to ask for; every class is asked for equally often, up to one, however `task` would.
    embeddings: [K, E], one for each class. Those of a text are a prior from outside: results are then no longer of the
      teacher alone. None: one-hot, which holds no such knowledge. (Under a random map without preferred directions,
      any other orthogonal ones would do the same.)
    num_steps: Inner steps, 30 to 40 as published.
    latent_dim: Z, or the shape of one latent, which a noisy layer gives.
    generator_lr: Adam's.
    latent_lr: Adam's, for the noisy layers; None: `generator_lr`, as published.
    meta: 'reinit' lets a generator live for `redraw_every` calls; FastDFKD's others work too.
    redraw_every: Published as ten epochs, each of two calls; None with another `meta`.
    redraw_std: None: the generator is drawn anew as it draws itself.
    adversarial_after: Calls before the adversarial term sets in: those of 20 epochs before the student's first step.
    capacity: Images that the buffer holds on this device.
    num_tasks: M, inversions on this device in one call, each with noisy layers of its own; the generator goes on from
      the average of where they left it. 1 is the published algorithm.
    axis: The mapped axis of devices, if any.
    **numbers: Of `meta.loop`.
  """
  classes = task.num_classes
  if not task.asks:
    raise ValueError('The task has no classes to ask for: this method, whose input they are, must have one an image.')
  embeddings = checked(embeddings, classes)
  task = task._replace(sample_labels=tasks.classification(classes, stratified=True).sample_labels)

  def sample_layers(key: PRNGKey, shape: tuple[int, ...]) -> NoisyLayers:
    return draw_layers(key, -(-shape[0] // classes), embeddings.shape[1], math.prod(shape[1:]))

  def read(layers: NoisyLayers, labels: Array) -> Array:
    found = latents_of(layers, labels, normalised(jnp.asarray(embeddings, layers.kernel.dtype)))
    return found if isinstance(latent_dim, int) else found.reshape(-1, *latent_dim)

  loop = inversions.loop(
      image_shape=image_shape, task=task, num_steps=num_steps, latent_dim=latent_dim, generator_lr=generator_lr,
      latent_lr=generator_lr if latent_lr is None else latent_lr, meta=meta, redraw_every=redraw_every,
      redraw_std=redraw_std, adversarial_after=adversarial_after, num_tasks=num_tasks, axis=axis,
      sample_latents=sample_layers, read=read, **numbers)
  return buffered.synthesizer(
      loop, image_shape=image_shape, task=task, capacity=capacity, num_tasks=num_tasks, axis=axis)
