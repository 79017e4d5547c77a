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

from flax import linen as nn

from dfkd_jax import augment as augmentations
from dfkd_jax.synth import inversion, objective, replay
from dfkd_jax.synth.inner_loop import InnerLoop, StepOutput
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.moving_average import MovingAverage
from dfkd_jax.synth.objective import Adversary, Factors
from dfkd_jax.synth.outer_loop import OuterLoop
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array, PRNGKey


def fast_dfkd(
    *, generator: nn.Module, image_shape: tuple[int, int, int], task: Task, factors: Factors,
    latents: Latents = Latents(), inner: InnerLoop = InnerLoop(), outer: OuterLoop = OuterLoop(),
    layout: Layout = Layout(), average: MovingAverage = MovingAverage(), capacity: int = 56_320,
    moments_momentum: float = 0.9, adversarial_after: int = 19, adversary: Adversary = Adversary(),
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
  meta = inversion.MetaGenerator(
      generator=generator, image_shape=image_shape, task=task, latents=latents, inner=inner,
      outer=outer, layout=layout, average=average, capacity=capacity,
      moments_momentum=moments_momentum)

  def init(key, teacher):
    return meta.init(key, teacher, factors)

  def invert(state, key, teacher, student, factors):
    """Runs the inner loops of one call."""
    inputs = meta.draw_inputs(state, key)
    factors = factors.late_adversary(state.step, adversarial_after)

    def loss_fn(variables, key_step, labels):
      images = meta.render(variables['params'], variables['latents'], labels)
      views = augment(key_step, images)
      outputs = teacher(views)
      terms = objective.terms(
          factors, outputs, views, task.labels_from(outputs.logits, labels), teacher=teacher,
          student=student, history=inputs.history, adversary=adversary, reduce=task.reduce)
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
    state, key = meta.with_fresh_latents(state, key)
    kept = invert(state, key, teacher, student, factors.for_student(student)).kept
    return replay.unsaved(kept['images'], kept['labels'])

  return Synthesizer(init, synthesize, meta.sample, fresh=fresh, generator=inversion.generator,
                     with_generator=inversion.with_generator)
