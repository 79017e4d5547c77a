"""NAYER: classes are the generator's input, and a layer drawn anew for each batch is the noise.

FastDFKD's inner loop with other latents. A constant embedding of each class, such as a language
model's of its name, goes through a noisy layer, a random linear map, into the generator. Noisy
layers are drawn afresh in every call and move with the generator in its inner steps; each serves
one image of every class. The generator goes on from call to call, and is drawn anew every so
often.

References:
  Tran et al., NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free Knowledge
  Distillation, CVPR 2024, https://arxiv.org/abs/2310.00258, and its published program for
  numbers. Written from notes on both; trajectories were not compared. The published batch norm
  before the noisy layers has a scale and a shift that live as long as the generator. Here it has
  neither, since a linear map follows.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from dfkd_jax import augment as augmentations
from dfkd_jax import tasks
from dfkd_jax.messages import FieldError
from dfkd_jax.synth import inversion, objective, replay
from dfkd_jax.synth.inner_loop import InnerLoop, StepOutput
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.moving_average import MovingAverage
from dfkd_jax.synth.objective import Adversary, Factors
from dfkd_jax.synth.outer_loop import OuterLoop
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Array, PRNGKey


class NoisyLayers(struct.PyTreeNode):
  """Dense layers, one for every K images, with K classes."""

  kernel: Array  # [L, E, Z]
  bias: Array  # [L, Z]


def nayer(
    *, generator: nn.Module, image_shape: tuple[int, int, int], task: tasks.Task, factors: Factors,
    embeddings: Array | None = None, latent_dim: int | tuple[int, ...] = 1_000,
    inner: InnerLoop = InnerLoop(num_steps=40, generator_lr=4e-3, latent_lr=None),
    outer: OuterLoop = OuterLoop(meta='reinit', redraw_every=20, redraw_std=None),
    layout: Layout = Layout(), average: MovingAverage = MovingAverage(), capacity: int = 160_000,
    moments_momentum: float = 0.9, adversarial_after: int = 200, adversary: Adversary = Adversary(),
    augment: Callable[[PRNGKey, Array], Array] = augmentations.crop_and_flip,
) -> Synthesizer:
  """Makes the NAYER synthesizer; defaults are the published ones for CIFAR-100.

  Args:
    task: Must have classes to ask for. Every class is asked for equally often, up to one.
    embeddings: [K, E], one for each class. Embeddings of text are a prior from outside: results
      then no longer rest on the teacher alone. None: one-hot, without such knowledge (under a
      random map without preferred directions all orthogonal embeddings are equivalent).
    latent_dim: Z, or the shape of one latent, the output of a noisy layer.
    inner: The inner loop, published with 30 to 40 steps. `latent_lr` moves the noisy layers.
    outer: 'reinit' lets a generator live for `redraw_every` calls, published as ten epochs of two
      calls; the others of `OuterLoop` work too.
    layout: Batch sizes, tasks and devices. Each task has its own noisy layers; the generator goes
      on from the average over tasks. One task is the published algorithm.
    adversarial_after: Calls before the adversarial term sets in, published as 20 epochs, before
      the student's first step.
    Others: See `fast_dfkd`.
  """
  num_classes = task.num_classes
  if not task.asks:
    raise FieldError('task', 'The task has no classes to ask for: this method needs one an image, '
                     'as its input.')
  factors = factors.checked()
  embeddings = check_embeddings(embeddings, num_classes)
  latent_shape = (latent_dim,) if isinstance(latent_dim, int) else tuple(latent_dim)
  stratified = tasks.classification(num_classes, stratified=True)
  task = task._replace(sample_labels=stratified.sample_labels)

  def draw(key, shape):
    """Draws as many noisy layers as images of one class, for latents of a shape [B, ...]."""
    number = -(-shape[0] // num_classes)
    return draw_layers(key, number, embeddings.shape[1], math.prod(shape[1:]))

  def decode(layers, labels):
    normalised = normalise(jnp.asarray(embeddings, layers.kernel.dtype))
    return decode_latents(layers, labels, normalised).reshape(-1, *latent_shape)

  latents = Latents(latent_dim, sample_latents=draw, decode=decode)
  meta = inversion.MetaGenerator(
      generator=generator, image_shape=image_shape, task=task, latents=latents, inner=inner,
      outer=outer, layout=layout, average=average, capacity=capacity,
      moments_momentum=moments_momentum)

  def init(key, teacher):
    return meta.init(key, teacher, factors)

  def invert(state, key, teacher, student, factors):
    """Runs the inner loops of one call, on noisy layers and the generator."""
    inputs = meta.draw_inputs(state, key)
    factors = factors.late_adversary(state.step, adversarial_after)

    def loss_fn(variables, key_step, labels):
      images = meta.render(variables['params'], variables['latents'], labels)
      views = augment(key_step, images)
      outputs = teacher(views)
      terms = objective.terms(
          factors, outputs, views, labels, teacher=teacher, student=student,
          history=inputs.history, adversary=adversary, reduce=task.reduce)
      loss, metrics = objective.total(terms, factors)
      kept = {'images': images, 'labels': task.predicted(outputs.logits)}
      return loss, StepOutput(kept, outputs.moments, metrics)

    return meta.invert(inputs, loss_fn)

  def synthesize(state, key, teacher, student):
    inversions = invert(state, key, teacher, student, factors)
    state, kept = meta.update(state, inversions), inversions.kept
    buffer = replay.add(state.buffer, kept['images'], kept['labels'], layout.axis)
    return state.replace(buffer=buffer), inversions.metrics

  def fresh(state, key, teacher, student=None):
    kept = invert(state, key, teacher, student, factors.for_student(student)).kept
    return replay.unsaved(kept['images'], kept['labels'])

  return Synthesizer(init, synthesize, meta.sample, fresh=fresh, generator=inversion.generator,
                     with_generator=inversion.with_generator)


def draw_layers(key: PRNGKey, number: int, size: int, latent_dim: int) -> NoisyLayers:
  """Draws noisy layers for embeddings of `size` numbers: kernels from N(0, 1), biases 0."""
  kernel = jax.random.normal(key, (number, size, latent_dim))
  return NoisyLayers(kernel, jnp.zeros((number, latent_dim), kernel.dtype))


def normalise(embeddings: Array, epsilon: float = 1e-5) -> Array:
  """Standardises embeddings [K, E] over classes, as a batch norm with all equally frequent."""
  return (embeddings - embeddings.mean(0)) * jax.lax.rsqrt(embeddings.var(0) + epsilon)


def decode_latents(layers: NoisyLayers, labels: Array, embeddings: Array) -> Array:
  """Returns latents [B, Z]; the n-th image of a class goes through the n-th noisy layer.

  Args:
    layers: One for each image of the most frequent class; with fewer, two of its latents agree.
    labels: [B] int32.
    embeddings: [K, E], normalised.
  """
  latents = jnp.einsum('ke,lez->lkz', embeddings, layers.kernel) + layers.bias[:, None]
  is_class = jax.nn.one_hot(labels, embeddings.shape[0], dtype=jnp.int32)
  counts = jnp.take_along_axis(jnp.cumsum(is_class, axis=0), labels[:, None], axis=1)[:, 0]
  return latents[counts - 1, labels]


def check_embeddings(embeddings: Any, num_classes: int) -> np.ndarray:
  """Returns one embedding for each class, [K, E]; one-hot if there are none.

  Raises:
    FieldError: They have another shape, are not finite, or two are the same.
  """
  if embeddings is None:
    return np.eye(num_classes)
  array = np.asarray(embeddings)
  if array.ndim != 2 or array.shape[0] != num_classes or not array.shape[1]:
    raise FieldError('embeddings', f'embeddings are {array.shape}, must be ({num_classes}, E): '
                     'one for each class.')
  if not np.isfinite(array).all():
    raise FieldError('embeddings', 'embeddings are not all finite, must be.')
  if len(np.unique(array, axis=0)) < num_classes:
    raise FieldError('embeddings', 'embeddings of two classes are the same, must differ.')
  return array
