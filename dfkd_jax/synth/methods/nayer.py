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
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generators, inversion, moving_average, objective, outer_loop, replay
from dfkd_jax.synth.inner_loop import StepOutput
from dfkd_jax.synth.inversion import InnerLoop
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.moving_average import MovingAverage
from dfkd_jax.synth.objective import Adversary, Factors, History
from dfkd_jax.synth.outer_loop import Inversions, OuterLoop
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Array, Batch, Metrics, PRNGKey, PyTree


class NoisyLayers(struct.PyTreeNode):
  """Dense layers, one for every K images, with K classes."""

  kernel: Array  # [L, E, Z]
  bias: Array  # [L, Z]


State = outer_loop.State


def nayer(
    *,
    generator: nn.Module,
    image_shape: tuple[int, int, int],
    task: tasks.Task,
    factors: Factors,
    embeddings: Array | None = None,
    latent_dim: int | tuple[int, ...] = 1_000,
    inner: InnerLoop = InnerLoop(num_steps=40, generator_lr=4e-3, latent_lr=None),
    outer: OuterLoop = OuterLoop(meta='reinit', redraw_every=20, redraw_std=None),
    layout: Layout = Layout(),
    average: MovingAverage = MovingAverage(),
    capacity: int = 160_000,
    moments_momentum: float = 0.9,
    adversarial_after: int = 200,
    adversary: Adversary = Adversary(),
    augment: Callable[[PRNGKey, Array], Array] = augmentations.crop_and_flip,
) -> Synthesizer:
  """Makes the NAYER synthesizer; defaults are the published ones for CIFAR-100.

  Args:
    generator: Maps latents [B, Z] (or [B, h, w, Z]) to images [B, H, W, C] in (0, 1).
    image_shape: [H, W, C] of its images.
    task: Must have classes to ask for. Every class is asked for equally often, up to one.
    factors: Factors of the terms.
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
    average, capacity, moments_momentum, adversary, augment: See `fast_dfkd`.
  """
  num_classes = task.num_classes
  if not task.asks:
    raise FieldError('task', 'The task has no classes to ask for: this method needs one an image, '
                     'as its input.')
  factors = factors.checked()
  inversion.check_momentum(moments_momentum)
  embeddings = check_embeddings(embeddings, num_classes)
  task = task._replace(
      sample_labels=tasks.classification(num_classes, stratified=True).sample_labels)
  stripe = layout.share(capacity, 'capacity')
  num_averaged = average.num_images(layout, outer.is_new_every_call)
  latent_shape = (latent_dim,) if isinstance(latent_dim, int) else tuple(latent_dim)
  batch_shape = (layout.batch_size, *latent_shape)
  meta_tx = outer.optimizer(inner)

  def init(key: PRNGKey, teacher: Network) -> State:
    key_params, _ = jax.random.split(key)
    params = generators.init(generator, key_params, batch_shape)
    outputs = generators.check(
        generator, params, batch_shape, image_shape, teacher, num_classes, factors)
    return State(
        latents=None, step=jnp.int32(0), meta_params=params, meta_opt_state=meta_tx.init(params),
        past=jax.tree.map(jnp.zeros_like, outputs.moments),
        buffer=replay.create(stripe, image_shape, num_classes, layout.num_tasks),
        ema=average.init(params))

  def draw(key_layers: PRNGKey, key_labels: PRNGKey, number: int, histogram: Array):
    """Draws noisy layers of each task, and labels [M, number]."""
    layers = layout.draw(key_layers, lambda k: draw_layers(
        k, -(-number // num_classes), embeddings.shape[1], math.prod(latent_shape)))
    return layers, layout.draw(key_labels, lambda k: task.sample_labels(k, number, histogram))

  def render(params: PyTree, layers: NoisyLayers, labels: Array) -> Array:
    latents = decode_latents(
        layers, labels, normalise(jnp.asarray(embeddings, layers.kernel.dtype)))
    return generators.render(generator, params, latents.reshape(-1, *latent_shape))

  def advance(
      state: State, key: PRNGKey, teacher: Network, student: Network | None, factors: Factors
  ) -> tuple[State, Inversions]:
    """Runs one call: inner loops on noisy layers and the generator, from which it goes on."""
    key_layers, key_labels, key_steps, key_renew = jax.random.split(key, 4)
    params = outer.renew(key_renew, state.meta_params, state.step, generator, batch_shape)
    layers, labels = draw(key_layers, key_labels, layout.batch_size, state.buffer.histogram)
    factors = inversion.with_late_adversary(factors, state.step, adversarial_after)
    history = History(state.past, inversion.momentum_at(state.step, moments_momentum))

    def loss_fn(variables, key_step, labels):
      images = render(variables['params'], variables['latents'], labels)
      views = augment(key_step, images)
      outputs = teacher(views)
      terms = objective.terms(
          factors, outputs, views, labels, teacher=teacher, student=student, history=history,
          adversary=adversary, reduce=task.reduce)
      loss, metrics = objective.total(terms, factors)
      kept = {'images': images, 'labels': task.predicted(outputs.logits)}
      return loss, StepOutput(kept, outputs.moments, metrics)

    found = outer.invert(key_steps, loss_fn, params, layers, labels, inner, layout)
    meta_params, opt_state = outer.update(
        meta_tx, found.meta_grads, state.meta_opt_state, params)
    return state.replace(
        step=state.step + 1, meta_params=meta_params, meta_opt_state=opt_state,
        past=inversion.average_moments(state.past, found.moments, state.step, moments_momentum),
        ema=average.update(state.ema, found.params, outer.is_new(state.step))), found

  def synthesize(
      state: State, key: PRNGKey, teacher: Network, student: Network | None
  ) -> tuple[State, Metrics]:
    state, found = advance(state, key, teacher, student, factors)
    buffer = replay.add(state.buffer, found.kept['images'], found.kept['labels'], layout.axis)
    return state.replace(buffer=buffer), found.metrics

  def sample(state: State, key: PRNGKey) -> Batch:
    return moving_average.sample(
        key, layout, num_averaged,
        lambda key, number: replay.sample(key, state.buffer, number, layout.axis),
        lambda key_layers, key_labels, number: layout.map(
            lambda inputs: render(state.ema, *inputs),
            draw(key_layers, key_labels, number, state.buffer.histogram)))

  def fresh(
      state: State, key: PRNGKey, teacher: Network, student: Network | None = None
  ) -> Batch:
    _, found = advance(state, key, teacher, student, inversion.for_student(factors, student))
    return replay.unsaved(found.kept['images'], found.kept['labels'])

  return Synthesizer(
      init, synthesize, sample, fresh=fresh,
      generator=lambda state: {'params': state.meta_params},
      with_generator=lambda state, variables: state.replace(meta_params=variables['params']))


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
