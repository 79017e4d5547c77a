"""FastDFKD: a meta-generator from which a few steps give a batch of images.

Inner loop: from a copy of the meta-generator, `num_steps` of Adam on that copy and on one latent
an image. Outer loop: the meta-generator follows by first-order MAML or by Reptile. The images go
to a replay buffer, from which the student's batches are drawn.

References:
  Fang et al., Up to 100x Faster Data-free Knowledge Distillation, AAAI 2022,
  https://arxiv.org/abs/2112.06253, algorithm 1. Where the text leaves room, the published code is
  followed: first-order MAML adds up the gradients of all inner steps, the image that is kept has
  the lowest loss before its step's update, and momentum on the moments weighs past against
  present.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax import augment as augmentations
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generators, inversion, moving_average, objective, outer_loop, replay
from dfkd_jax.synth.inner_loop import StepOutput
from dfkd_jax.synth.inversion import InnerLoop
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.moving_average import MovingAverage
from dfkd_jax.synth.objective import Adversary, Factors, History
from dfkd_jax.synth.outer_loop import Inversions, OuterLoop
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array, Batch, Metrics, PRNGKey

State = outer_loop.State


def fast_dfkd(
    *,
    generator: nn.Module,
    image_shape: tuple[int, int, int],
    task: Task,
    factors: Factors,
    latents: Latents = Latents(),
    inner: InnerLoop = InnerLoop(),
    outer: OuterLoop = OuterLoop(),
    layout: Layout = Layout(),
    average: MovingAverage = MovingAverage(),
    capacity: int = 56_320,
    moments_momentum: float = 0.9,
    adversarial_after: int = 19,
    adversary: Adversary = Adversary(),
    augment: Callable[[PRNGKey, Array], Array] = augmentations.crop_and_flip,
) -> Synthesizer:
  """Makes the FastDFKD synthesizer; defaults are Fast-5 of the published CIFAR script.

  The published CIFAR runs take 2, 5 or 10 for `num_steps` and 139 for `reset_after`. The run for
  ImageNet has meta='reptile', carry_latents=True, restart_every=50 and keep='last'.

  Args:
    generator: Maps latents [B, Z] (or [B, h, w, Z]) to images [B, H, W, C] in (0, 1).
    image_shape: [H, W, C] of its images.
    task: Task of the teacher.
    factors: Factors of the terms.
    latents: Shape and life of the latents.
    inner: The inner loop.
    outer: The outer loop.
    layout: Batch sizes, tasks and devices.
    average: Moving average of the generator, if any.
    capacity: Images in the buffer of this device, a multiple of `num_tasks`. The published buffer
      never drops any.
    moments_momentum: Share of earlier calls in the matched moments, in [0, 1).
    adversarial_after: Calls before the adversarial term sets in. The published gate compares a
      count from one with its warm-up of 20: so 19 here, one call before distillation begins.
    adversary: Divergence of the adversarial term.
    augment: (key, images) -> images, fresh in every inner step.
  """
  factors = factors.checked()
  inversion.check_momentum(moments_momentum)
  stripe = layout.share(capacity, 'capacity')
  num_averaged = average.num_images(layout, outer.is_new_every_call)
  latent_shape = latents.batch_shape(layout.batch_size)
  meta_tx = outer.optimizer(inner)

  def init(key: PRNGKey, teacher: Network) -> State:
    key_params, key_latents = jax.random.split(key)
    params = generators.init(generator, key_params, latent_shape)
    outputs = generators.check(
        generator, params, latent_shape, image_shape, teacher, task.num_classes, factors)
    return State(
        latents=latents.start(key_latents, layout), step=jnp.int32(0), meta_params=params,
        meta_opt_state=meta_tx.init(params), past=jax.tree.map(jnp.zeros_like, outputs.moments),
        buffer=replay.create(stripe, image_shape, task.num_classes, layout.num_tasks),
        ema=average.init(params))

  def advance(
      state: State, key: PRNGKey, teacher: Network, student: Network | None, factors: Factors
  ) -> tuple[State, Inversions]:
    """Runs one call: the inner loops, then one step of the outer loop."""
    key_latents, key_labels, key_steps, key_renew = jax.random.split(key, 4)
    params = outer.renew(key_renew, state.meta_params, state.step, generator, latent_shape)
    start = latents.of_call(key_latents, state.latents, state.step, layout)
    labels = layout.draw(
        key_labels,
        lambda k: task.sample_labels(k, layout.batch_size, state.buffer.histogram))
    factors = inversion.with_late_adversary(factors, state.step, adversarial_after)
    history = History(state.past, inversion.momentum_at(state.step, moments_momentum))

    def loss_fn(variables, key_step, labels):
      inputs = latents.decode(variables['latents'], labels)
      images = generators.render(generator, variables['params'], inputs)
      views = augment(key_step, images)
      outputs = teacher(views)
      terms = objective.terms(
          factors, outputs, views, task.labels_from(outputs.logits, labels), teacher=teacher,
          student=student, history=history, adversary=adversary, reduce=task.reduce)
      loss, metrics = objective.total(terms, factors)
      kept = {'images': images, 'labels': task.predicted(outputs.logits)}
      return loss, StepOutput(kept, outputs.moments, metrics)

    found = outer.invert(key_steps, loss_fn, params, start, labels, inner, layout)
    opt_state = latents.restart_optimizer(meta_tx, state.meta_opt_state, params, state.step)
    meta_params, opt_state = outer.update(meta_tx, found.meta_grads, opt_state, params)
    return state.replace(
        step=state.step + 1, meta_params=meta_params, meta_opt_state=opt_state,
        past=inversion.average_moments(state.past, found.moments, state.step, moments_momentum),
        latents=latents.carried(found.latents),
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
        lambda key_latents, key_labels, number: layout.map(
            lambda inputs: generators.render(generator, state.ema, latents.decode(*inputs)),
            latents.draw_with_labels(
                key_latents, key_labels, number, task, state.buffer.histogram, layout)))

  def fresh(
      state: State, key: PRNGKey, teacher: Network, student: Network | None = None
  ) -> Batch:
    key_latents, key = jax.random.split(key)
    state = state.replace(latents=latents.start(key_latents, layout))
    _, found = advance(state, key, teacher, student, inversion.for_student(factors, student))
    return replay.unsaved(found.kept['images'], found.kept['labels'])

  return Synthesizer(
      init, synthesize, sample, fresh=fresh,
      generator=lambda state: {'params': state.meta_params},
      with_generator=lambda state, variables: state.replace(meta_params=variables['params']))
