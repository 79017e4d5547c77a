"""Inversions from a meta-learned generator, the loop that FastDFKD, SSD-KD, CMI and NAYER share.

Inner loop (an inversion, or task): from a copy of the meta-generator, `num_steps`
of Adam on that copy and on one latent per image. Outer loop: the meta-generator
follows by first-order MAML or by Reptile, through an optax update of the gradient
averaged over `num_tasks` inversions on every device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from dfkd_jax import augment, parallel, tasks
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generators, inner_loop, moving_average, objective, replay
from dfkd_jax.types import Array, Batch, Metrics, Moments, Outputs, PRNGKey, PyTree

META = ('fomaml', 'reptile', 'sequential', 'reinit')


class State(struct.PyTreeNode):
  """What the loop carries from call to call, and the images that came of it."""

  latents: Array | None = parallel.sharded()  # [M, B, Z], only if carried
  step: Array  # [] int32, calls so far
  meta_params: PyTree  # of the generator
  meta_opt_state: PyTree
  past: dict[str, Moments]  # of the teacher's inputs, averaged over the calls so far
  buffer: replay.ReplayBuffer
  ema: PyTree | None = None  # moving average of the generator after its inner steps, if there is one


class Companion(NamedTuple):
  """Something that is trained beside the generator, such as CMI's head."""

  params: PyTree  # shared by all tasks
  opt_state: PyTree
  tx: optax.GradientTransformation
  memory: PyTree  # [M, ...], of each task; constant in an inversion
  terms: Callable[[PyTree, PyTree, Array, Outputs, PRNGKey], tuple[dict[str, Array], PyTree]]
  """(params, a task's memory, images, outputs, key) -> (terms, what to keep of the step)."""


class Found(NamedTuple):
  """What one call found; kept are those of each task's best (or last) step."""

  kept: dict[str, PyTree]  # images [M, B, H, W, C], labels [M, B]; with a modulation that and asked [M, B]; companion
  metrics: Metrics  # each [num_steps], averaged over tasks and devices
  companion: tuple[PyTree, PyTree] | None  # its params and opt_state, averaged over tasks and devices


class Loop(NamedTuple):
  """What methods take from the loop."""

  init: Callable[..., State]  # (key, teacher, buffer) -> State
  invert: Callable[..., tuple[State, Found]]  # (state, key, teacher, student, companion=None) -> (State, Found)
  sample: Callable[..., Batch]  # (state, key, draw: (key, number) -> Batch of the buffer) -> Batch of the student


def loop(
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
    redraw_every: int | None = None,
    redraw_std: float | None = 0.02,
    moments_momentum: float = 0.9,
    adversarial_after: int = 0,
    reset_after: int | None = None,
    carry_latents: bool = False,
    restart_every: int | None = None,
    keep: str = 'best',
    batch_size: int = 256,
    sample_batch_size: int = 256,
    num_tasks: int = 1,
    task_map: str = 'auto',
    axis: str | None = None,
    augment: Callable[[PRNGKey, Array], Array] = augment.crop_and_flip,
    sample_latents: Callable[[PRNGKey, tuple[int, ...]], PyTree] = jax.random.normal,
    read: Callable[[PyTree, Array], Array] = lambda latents, labels: latents,
    ema_decay: float | None = None,
    ema_share: float = 0.5,
    ask: bool = True,
    modulate: Callable[[replay.ReplayBuffer, Array, Array], Array] | None = None,
    adversary: objective.Adversary = objective.Adversary(),
    companion_terms: tuple[str, ...] = (),
) -> Loop:
  """Makes the loop.

  Args:
    generator: Maps latents [B, Z] (or [B, h, w, Z]) to images [B, H, W, C] in (0, 1), always
      normalising by the batch.
    image_shape: [H, W, C] of its images.
    task: What the teacher was trained for.
    factors: Of the terms.
    num_steps: Inner steps.
    latent_dim: Z, or the shape of one latent.
    generator_lr: Adam's, for the copy of the generator. Its state is fresh in every call.
    latent_lr: Adam's, for the latents.
    adam_b1: Decay of Adam's first moment, inner and outer.
    adam_b2: Decay of Adam's second moment, inner and outer.
    meta: 'fomaml'; 'reptile'; 'sequential' (the copy becomes the generator; no outer loop); or 'reinit' (the same
      with a generator that is drawn anew before every call or every few).
    meta_lr: Of the outer Adam; None: `generator_lr * num_steps`, as published.
    reptile_scale: Factor of Reptile's gradient. Adam makes it matter through epsilon only.
    redraw_every: With meta='reinit': calls for which a generator lasts; None: one, and nothing is learnt between calls.
    redraw_std: With meta='reinit': deviation of `generative.redraw`; None: as the generator draws itself.
    moments_momentum: Share of former calls in the moments that are matched, in [0, 1); 0 turns it off.
    adversarial_after: Calls before the adversarial term sets in.
    reset_after: Calls before the generator's first layers are drawn anew, once; None: never.
    carry_latents: Go on from the last call's latents.
    restart_every: With `carry_latents`: calls between fresh latents and a fresh outer Adam; None: never.
    keep: Images of the 'best' inner step, or of the 'last'.
    batch_size: B, images of one task in one call.
    sample_batch_size: Images for one step of the student, on this device.
    num_tasks: M, inversions on this device in one call; 1 is the published algorithm.
    task_map: How tasks are mapped, see `optimize.task_mapper`.
    axis: The mapped axis of devices, if any.
    augment: (key, images) -> images, fresh in every inner step.
    sample_latents: (key, shape) -> latents, or whatever `read` takes; `latent_lr` is its rate.
    read: (what was sampled and moved by the inner steps, labels [B]) -> latents.
    ema_decay: Of a moving average of the generator as it stands after a call's inner steps, from which the student
      learns too, see `generative.num_averaged`; None: there is none. It begins anew with each generator drawn anew.
    ema_share: Of the student's images, those that the moving average makes, of fresh latents that no step has moved.
    ask: Whether classes are asked for; else the target is the class that the teacher sees.
    modulate: (buffer, logits [B, ..., K], labels [B, ...]) -> [B, ...], by which each image's one_hot counts.
    adversary: The measure of the adversarial term.
    companion_terms: Names of the terms that the companion handed to `invert` adds.
  """
  if meta not in META:
    raise ValueError(f'meta is {meta!r}, must be one of {META}.')
  if not 0 <= moments_momentum < 1:
    raise ValueError(f'moments_momentum is {moments_momentum}, must be in [0, 1).')
  if restart_every is not None and not carry_latents:
    raise ValueError(f'restart_every is {restart_every}, must be None where carry_latents is False.')
  if meta == 'reinit' and reset_after is not None:
    raise ValueError(f"reset_after is {reset_after}, must be None where meta is 'reinit'.")
  if redraw_every is not None and (meta != 'reinit' or redraw_every < 1):
    raise ValueError(f"redraw_every is {redraw_every}, must be at least 1, and None where meta is not 'reinit'.")
  if redraw_std is not None and redraw_std <= 0:
    raise ValueError(f'redraw_std is {redraw_std}, must be above 0, or None.')
  if ema_decay is not None and meta == 'reinit' and redraw_every in (None, 1):
    raise ValueError(f'ema_decay is {ema_decay}, must be None where each call has a generator of its own.')
  factors = factors.checked(companion_terms)
  latent_shape = (latent_dim,) if isinstance(latent_dim, int) else tuple(latent_dim)
  share = parallel.even_share(sample_batch_size, num_tasks, 'sample_batch_size')
  num_averaged = moving_average.num_averaged(ema_decay, ema_share, share)
  drawn = lambda key, params: generators.redraw(key, params, redraw_std) if redraw_std else generators.init(
      generator, key, (batch_size, *latent_shape))
  map_tasks = inner_loop.task_mapper(task_map)
  adam = lambda lr: optax.adam(lr, b1=adam_b1, b2=adam_b2)
  meta_tx = adam(generator_lr * num_steps if meta_lr is None else meta_lr)

  def init(key: PRNGKey, teacher: Network, buffer: replay.ReplayBuffer) -> State:
    key_params, key_latents = jax.random.split(key)
    params = generators.init(generator, key_params, (batch_size, *latent_shape))
    shapes = generators.check_shapes(generator, params, (batch_size, *latent_shape), image_shape, teacher, task.num_classes)
    generators.check_batch_norm(factors, teacher, shapes)
    return State(
        latents=draw_latents(key_latents) if carry_latents else None,
        step=jnp.int32(0), meta_params=params, meta_opt_state=meta_tx.init(params),
        past=jax.tree.map(jnp.zeros_like, shapes.moments), buffer=buffer,
        ema=jax.tree.map(jnp.copy, params) if num_averaged else None)  # A copy, since states are donated.

  def draw_latents(key: PRNGKey, number: int = batch_size) -> PyTree:
    keys = parallel.task_keys(key, num_tasks, axis)
    return jax.vmap(lambda k: sample_latents(k, (number, *latent_shape)))(keys)

  def draw_labels(key: PRNGKey, number: int, histogram: Array) -> Array:
    keys = parallel.task_keys(key, num_tasks, axis)
    return jax.vmap(lambda k: task.sample_labels(k, number, histogram))(keys)

  def inversion(state: State, inputs: PyTree, teacher: Network, student: Network | None, companion: Companion | None):
    """One task: (what was sampled, labels [B], key, the companion's memory) -> (meta-gradient, Minimum)."""
    latents, labels, key, memory = inputs
    momentum = jnp.where(state.step == 0, 0, moments_momentum)
    now = factors
    if factors.active('adversarial'):
      now = factors._replace(adversarial=factors.adversarial * (state.step >= adversarial_after))

    def loss_fn(variables, step_key):
      images = generators.render(generator, variables['params'], read(variables['latents'], labels))
      view_key, companion_key = (step_key, None) if companion is None else jax.random.split(step_key)
      seen = augment(view_key, images)
      outputs = teacher(seen)
      targets = task.labels_from(outputs.logits, labels if ask else None)
      kept = {'images': images, 'labels': task.predicted(outputs.logits)}
      modulation = None
      if modulate is not None:
        modulation = modulate(state.buffer, outputs.logits, targets)
        kept |= {'modulation': task.reduce(modulation), 'asked': labels}
      found = objective.terms(
          now, outputs, seen, targets, teacher=teacher, student=student, past=state.past, momentum=momentum,
          modulation=modulation, adversary=adversary, reduce=task.reduce)
      if companion is not None:
        further, kept['companion'] = companion.terms(
            variables['companion'], memory, images, outputs, companion_key)
        found |= further
      loss, metrics = objective.total(found, now)
      return loss, inner_loop.StepOutput(kept, outputs.moments, metrics)

    variables = {'params': state.meta_params, 'latents': latents}
    parts = {'params': adam(generator_lr), 'latents': adam(latent_lr)}
    if companion is not None:
      variables['companion'], parts['companion'] = companion.params, companion.tx
    tx = inner_loop.by_part(parts)
    opt_state = tx.init(variables)
    if companion is not None:
      opt_state['companion'] = companion.opt_state
    found = inner_loop.minimize(key, loss_fn, variables, opt_state, tx=tx, num_steps=num_steps, keep=keep)
    if meta == 'fomaml':  # First order: the gradients met on the way.
      return found.grads['params'], found
    scale = reptile_scale if meta == 'reptile' else 1.0
    return jax.tree.map(lambda a, b: scale * (a - b), state.meta_params, found.variables['params']), found

  def invert(
      state: State, key: PRNGKey, teacher: Network, student: Network | None, companion: Companion | None = None
  ) -> tuple[State, Found]:
    key_latents, key_labels, key_steps, key_reset = jax.random.split(key, 4)
    state = restarted(state, key_latents, key_reset)
    latents = state.latents if carry_latents else draw_latents(key_latents)
    labels = draw_labels(key_labels, batch_size, state.buffer.histogram)
    memory = None if companion is None else companion.memory

    def one(inputs):
      meta_grads, found = inversion(state, inputs, teacher, student, companion)
      trained = None if companion is None else (found.variables['companion'], found.opt_state['companion'])
      latents = found.variables['latents'] if carry_latents else None
      moved = found.variables['params'] if num_averaged else None
      return (meta_grads, found.aux, found.metrics, trained, moved), found.kept, latents

    inputs = (latents, labels, parallel.task_keys(key_steps, num_tasks, axis), memory)
    to_average, kept, latents = inner_loop.map_tasks(map_tasks, one, inputs)
    averages = parallel.pmean(jax.tree.map(inner_loop.mean_over_tasks, to_average), axis)
    meta_grads, moments, metrics, trained, moved = averages
    if meta in ('sequential', 'reinit'):
      meta_params, meta_opt_state = jax.tree.map(jnp.subtract, state.meta_params, meta_grads), state.meta_opt_state
    else:
      updates, meta_opt_state = meta_tx.update(meta_grads, state.meta_opt_state, state.meta_params)
      meta_params = optax.apply_updates(state.meta_params, updates)
    if num_averaged:
      new = jnp.where(is_new(state.step), 1, 1 - ema_decay)  # What was never trained has no share in it.
      state = state.replace(ema=optax.incremental_update(moved, state.ema, new))
    new = jnp.where(state.step == 0, 1, 1 - moments_momentum)
    return state.replace(
        latents=latents, step=state.step + 1, meta_params=meta_params, meta_opt_state=meta_opt_state,
        past=optax.incremental_update(moments, state.past, new)), Found(kept, metrics, trained)

  def restarted(state: State, key_latents: PRNGKey, key_reset: PRNGKey) -> State:
    """What is drawn anew before a call, where that is asked for."""
    if meta == 'reinit':
      state = state.replace(meta_params=jax.lax.cond(
          is_new(state.step), lambda p: drawn(key_reset, p), lambda p: p, state.meta_params))
    if reset_after is not None:
      state = state.replace(meta_params=jax.lax.cond(
          state.step == reset_after, lambda p: generators.reset(key_reset, p, generator.first_layers),
          lambda p: p, state.meta_params))
    if carry_latents and restart_every is not None:
      fresh = (draw_latents(key_latents), meta_tx.init(state.meta_params))
      # The published count is from one: calls 50, 100, ... begin anew.
      latents, meta_opt_state = jax.lax.cond(
          (state.step + 1) % restart_every == 0, lambda: fresh, lambda: (state.latents, state.meta_opt_state))
      state = state.replace(latents=latents, meta_opt_state=meta_opt_state)
    return state

  def is_new(step: Array) -> Array:
    """Whether the generator of a call does not go on from that of the call before."""
    if meta == 'reinit':
      return step % (redraw_every or 1) == 0
    return (step == 0) | (False if reset_after is None else step == reset_after)

  def sample(state: State, key: PRNGKey, draw: Callable[[PRNGKey, int], Batch]) -> Batch:
    if not num_averaged:
      return draw(key, sample_batch_size)
    key_buffer, key_latents, key_labels = jax.random.split(key, 3)
    images = inner_loop.map_tasks(
        map_tasks, lambda inputs: generators.render(generator, state.ema, read(*inputs)),
        (draw_latents(key_latents, num_averaged), draw_labels(key_labels, num_averaged, state.buffer.histogram)))
    return moving_average.append_images(draw(key_buffer, sample_batch_size - num_tasks * num_averaged), images)

  return Loop(init, invert, sample)
