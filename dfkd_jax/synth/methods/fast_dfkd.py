"""FastDFKD: a meta-generator from which a few steps give a batch of images.

Inner loop (an inversion, or task): from a copy of the meta-generator,
`num_steps` of Adam on that copy and on one latent per image. Outer loop: the
meta-generator follows by first-order MAML or by Reptile, through an optax update
of the gradient averaged over `num_tasks` inversions on every device. The images
go to a replay buffer.

References:
  Fang et al., Up to 100x Faster Data-free Knowledge Distillation, AAAI 2022,
  https://arxiv.org/abs/2112.06253, algorithm 1. Where the text leaves room, the
  published code's behaviour is followed: first-order MAML adds up the gradients
  of all inner steps, the image kept is the one of the lowest loss before the
  step's update, and momentum on the moments weighs past against present.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from dfkd_jax import augment as augmentations
from dfkd_jax import parallel, tasks
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generative, objective, optimize, replay
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Array, Batch, Metrics, Moments, PRNGKey, PyTree

META = ('fomaml', 'reptile', 'sequential')


class State(struct.PyTreeNode):
  """What FastDFKD carries from call to call."""

  latents: Array | None = parallel.sharded()  # [M, B, Z], only if carried
  step: Array  # [] int32, calls so far
  meta_params: PyTree  # of the generator
  meta_opt_state: PyTree
  past: dict[str, Moments]  # of the teacher's inputs, averaged over the calls so far
  buffer: replay.ReplayBuffer


def fast_dfkd(
    *,
    generator: nn.Module,
    image_shape: tuple[int, int, int],
    task: tasks.Task,
    factors: objective.Factors,
    num_steps: int = 5,
    latent_dim: int | tuple[int, ...] = 256,
    generator_lr: float = 3e-3,
    latent_lr: float = 1e-2,
    adam_b1: float = 0.5,
    adam_b2: float = 0.999,
    meta: str = 'fomaml',
    meta_lr: float | None = None,
    reptile_scale: float = 67.0,
    moments_momentum: float = 0.9,
    adversarial_after: int = 19,
    reset_after: int | None = None,
    carry_latents: bool = False,
    restart_every: int | None = None,
    keep: str = 'best',
    batch_size: int = 256,
    sample_batch_size: int = 256,
    capacity: int = 56_320,
    num_tasks: int = 1,
    task_map: str = 'auto',
    axis: str | None = None,
    augment: Callable[[PRNGKey, Array], Array] = augmentations.crop_and_flip,
    sample_latents: Callable[[PRNGKey, tuple[int, ...]], Array] = jax.random.normal,
) -> Synthesizer:
  """Makes the FastDFKD synthesizer; defaults are Fast-5 of the published CIFAR script.

  Args:
    generator: Maps latents [B, Z] (or [B, h, w, Z]) to images [B, H, W, C] in (0, 1), always
      normalising by the batch.
    image_shape: [H, W, C] of its images.
    task: What the teacher was trained for.
    factors: Of one_hot, batch_norm, adversarial and whatever else is wanted.
    num_steps: Inner steps, 2, 5 or 10 in the paper.
    latent_dim: Z, or the shape of one latent.
    generator_lr: Adam's, for the copy of the generator. Its state is fresh in every call.
    latent_lr: Adam's, for the latents.
    adam_b1: Decay of Adam's first moment, inner and outer.
    adam_b2: Decay of Adam's second moment, inner and outer.
    meta: 'fomaml', 'reptile', or 'sequential' (the copy becomes the generator; no outer loop).
    meta_lr: Of the outer Adam; None: `generator_lr * num_steps`, as published.
    reptile_scale: Factor of Reptile's gradient. Adam makes it matter through epsilon only.
    moments_momentum: Share of former calls in the moments that are matched; 0 turns it off.
    adversarial_after: Calls before the adversarial term sets in. The published gate compares a
      count from one with its warm-up of 20: so 19 here, one call before distillation begins.
    reset_after: Calls before the generator's first layers are drawn anew, once (published: 139); None: never.
    carry_latents: Go on from the last call's latents (the ImageNet variant).
    restart_every: With `carry_latents`: calls between fresh latents and a fresh outer Adam; None: never.
    keep: Images of the 'best' inner step, or of the 'last' (the ImageNet variant).
    batch_size: B, images of one task in one call.
    sample_batch_size: Images for one step of the student, on this device.
    capacity: Images that the buffer holds on this device; the published one never drops any.
    num_tasks: M, inversions on this device in one call; 1 is the published algorithm.
    task_map: How tasks are mapped, see `optimize.task_mapper`.
    axis: The mapped axis of devices, if any.
    augment: (key, images) -> images, fresh in every inner step.
    sample_latents: (key, shape) -> latents.
  """
  if meta not in META:
    raise ValueError(f'meta is {meta!r}, must be one of {META}.')
  if not 0 <= moments_momentum < 1:
    raise ValueError(f'moments_momentum is {moments_momentum}, must be in [0, 1).')
  if restart_every is not None and not carry_latents:
    raise ValueError(f'restart_every is {restart_every}, must be None where carry_latents is False.')
  factors = factors.checked()
  latent_shape = (batch_size, *((latent_dim,) if isinstance(latent_dim, int) else latent_dim))
  share = parallel.even_share(capacity, num_tasks, 'capacity')
  map_tasks = optimize.task_mapper(task_map)
  adam = lambda lr: optax.adam(lr, b1=adam_b1, b2=adam_b2)
  inner_tx = optax.multi_transform(
      {'params': adam(generator_lr), 'latents': adam(latent_lr)}, {'params': 'params', 'latents': 'latents'})
  meta_tx = adam(generator_lr * num_steps if meta_lr is None else meta_lr)

  def init(key: PRNGKey, teacher: Network) -> State:
    if factors.active('batch_norm') and not teacher.running():
      raise ValueError('The teacher has no BatchNorm: the term batch_norm has nothing to match, its factor must be 0.')
    key_params, key_latents = jax.random.split(key)
    params = generative.init(generator, key_params, latent_shape)
    shapes = generative.check(generator, params, latent_shape, image_shape, teacher, task.num_classes)
    return State(
        latents=draw_latents(key_latents) if carry_latents else None,
        step=jnp.int32(0), meta_params=params, meta_opt_state=meta_tx.init(params),
        past=jax.tree.map(jnp.zeros_like, shapes.moments),
        buffer=replay.create(share, image_shape, task.num_classes, num_tasks))

  def draw_latents(key: PRNGKey) -> Array:
    return jax.vmap(lambda k: sample_latents(k, latent_shape))(parallel.task_keys(key, num_tasks, axis))

  def invert(state: State, latents: Array, labels: Array, key: PRNGKey, teacher: Network, student: Network | None):
    """One task: latents [B, Z] and labels [B] -> (meta-gradient, Minimum)."""
    first_call = state.step == 0
    now = factors
    if factors.active('adversarial'):
      now = factors._replace(adversarial=factors.adversarial * (state.step >= adversarial_after))

    def loss_fn(variables, step_key):
      images = generative.render(generator, variables['params'], variables['latents'])
      seen = augment(step_key, images)
      outputs = teacher(seen)
      found = objective.terms(
          now, outputs, seen, task.labels_from(outputs.logits, labels), teacher=teacher, student=student,
          past=state.past, momentum=jnp.where(first_call, 0, moments_momentum), reduce=task.reduce)
      loss, metrics = objective.total(found, now)
      kept = {'images': images, 'labels': task.predicted(outputs.logits)}
      return loss, optimize.Seen(kept, outputs.moments, metrics)

    variables = {'params': state.meta_params, 'latents': latents}
    found = optimize.minimize(
        key, loss_fn, variables, inner_tx.init(variables), tx=inner_tx, num_steps=num_steps, keep=keep)
    if meta == 'fomaml':  # First order: the gradients met on the way.
      return found.grads['params'], found
    scale = reptile_scale if meta == 'reptile' else 1.0
    return jax.tree.map(lambda a, b: scale * (a - b), state.meta_params, found.variables['params']), found

  def synthesize(
      state: State, key: PRNGKey, teacher: Network, student: Network | None
  ) -> tuple[State, Metrics]:
    key_latents, key_labels, key_steps, key_reset = jax.random.split(key, 4)
    state = restarted(state, key_latents, key_reset)
    latents = state.latents if carry_latents else draw_latents(key_latents)
    labels = jax.vmap(lambda k: task.sample_labels(k, batch_size, state.buffer.histogram))(
        parallel.task_keys(key_labels, num_tasks, axis))
    inputs = (latents, labels, parallel.task_keys(key_steps, num_tasks, axis))

    def one(task_inputs):
      meta_grads, found = invert(state, *task_inputs, teacher, student)
      return meta_grads, found.kept, found.aux, found.metrics, found.variables['latents'] if carry_latents else None

    meta_grads, kept, moments, metrics, latents = optimize.over_tasks(map_tasks, one, inputs)
    averaged = jax.tree.map(lambda a: a.mean(0), (meta_grads, moments, metrics))
    meta_grads, moments, metrics = parallel.pmean(averaged, axis)
    if meta == 'sequential':
      meta_params, meta_opt_state = jax.tree.map(jnp.subtract, state.meta_params, meta_grads), state.meta_opt_state
    else:
      updates, meta_opt_state = meta_tx.update(meta_grads, state.meta_opt_state, state.meta_params)
      meta_params = optax.apply_updates(state.meta_params, updates)
    return state.replace(
        latents=latents, step=state.step + 1, meta_params=meta_params, meta_opt_state=meta_opt_state,
        past=optax.incremental_update(moments, state.past, jnp.where(state.step == 0, 1, 1 - moments_momentum)),
        buffer=replay.add(state.buffer, kept['images'], kept['labels'], axis)), metrics

  def restarted(state: State, key_latents: PRNGKey, key_reset: PRNGKey) -> State:
    """What is drawn anew before a call, where that is asked for."""
    if reset_after is not None:
      state = state.replace(meta_params=jax.lax.cond(
          state.step == reset_after, lambda p: generative.reset(key_reset, p, generator.first_layers),
          lambda p: p, state.meta_params))
    if carry_latents and restart_every is not None:
      fresh = (draw_latents(key_latents), meta_tx.init(state.meta_params))
      # The published count is from one: calls 50, 100, ... begin anew.
      latents, meta_opt_state = jax.lax.cond(
          (state.step + 1) % restart_every == 0, lambda: fresh, lambda: (state.latents, state.meta_opt_state))
      state = state.replace(latents=latents, meta_opt_state=meta_opt_state)
    return state

  def sample(state: State, key: PRNGKey) -> Batch:
    return replay.sample(key, state.buffer, sample_batch_size, axis)

  return Synthesizer(init, synthesize, sample)
