"""SSD-KD: FastDFKD with a small buffer that is kept balanced, and drawn from by priority.

Three additions to FastDFKD. Inversion: the one_hot term of an image is multiplied by the rarity
of its class in the buffer (diversity) and by the teacher's uncertainty (difficulty). Buffer: a
ring of a tenth of the usual images. Distillation: images are drawn in proportion to their loss
when last seen, and importance weights take back a part of that bias.

References:
  Liu et al., Small Scale Data-Free Knowledge Distillation, CVPR 2024,
  https://arxiv.org/abs/2406.07876. Neither its full text nor code was at hand: the modulation and
  the recursion of priorities follow a recollection of its equations that agrees with its
  abstract, its figure and a public summary. `Reading` names the choices that no source settles.
  Three more are fixed: batch_norm is FastDFKD's norm, with which its factors were found, where
  the paper is recalled to square it; the oldest images leave first; priorities have power 1.
  Schaul et al., Prioritized Experience Replay, 2016, https://arxiv.org/abs/1511.05952.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax import augment as augmentations
from dfkd_jax import parallel
from dfkd_jax.messages import FieldError, check_option
from dfkd_jax.synth import inversion, objective, replay
from dfkd_jax.synth import priorities as priority
from dfkd_jax.synth.inner_loop import InnerLoop, StepOutput
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.modulation import Modulation
from dfkd_jax.synth.moving_average import MovingAverage
from dfkd_jax.synth.objective import Adversary, Factors
from dfkd_jax.synth.outer_loop import OuterLoop
from dfkd_jax.synth.priorities import Priorities
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array, PRNGKey


@dataclasses.dataclass(frozen=True)
class Reading:
  """Choices that the paper's abstract leaves open; unverified.

  Targets are 'random' classes, as in FastDFKD, or the teacher's 'argmax'; None: 'random' where the
  task has classes to ask for. An image that was not drawn yet has the stripe's 'max' priority,
  that times its 'modulation', or 'one' on the scale of the student's loss.
  """

  counted: str = 'seen'  # class that the diversity counts: 'seen' by the teacher, or 'asked' for
  label_source: str | None = None  # of the targets: 'random', 'argmax' or None
  stop_modulation: bool = False  # True: no gradient flows through it, unlike in the focal loss
  new_priority: str = 'max'  # of an image that was not drawn yet: 'max', 'modulation' or 'one'
  normalise_weights: str = 'none'  # or 'max': divided by the batch's largest (2nd reference)
  normalised_diversity: bool = False  # whether to take our variant of `losses.curriculum.diversity`

  def __post_init__(self):
    check_option('counted', self.counted, ('seen', 'asked'))
    check_option('label_source', self.label_source, ('random', 'argmax', None))
    check_option('new_priority', self.new_priority, ('max', 'modulation', 'one'))
    check_option('normalise_weights', self.normalise_weights, ('none', 'max'))


State = inversion.State


def ssd_kd(
    *, generator: nn.Module, image_shape: tuple[int, int, int], task: Task, factors: Factors,
    modulation: Modulation = Modulation(), priorities: Priorities = Priorities(),
    reading: Reading = Reading(), latents: Latents = Latents(), inner: InnerLoop = InnerLoop(),
    outer: OuterLoop = OuterLoop(), layout: Layout = Layout(),
    average: MovingAverage = MovingAverage(), capacity: int = 5_000, moments_momentum: float = 0.9,
    adversarial_after: int = 19, adversary: Adversary = Adversary(),
    augment: Callable[[PRNGKey, Array], Array] = augmentations.crop_and_flip,
) -> Synthesizer:
  """Makes the SSD-KD synthesizer; numbers that the paper's abstract lacks are FastDFKD's.

  Args:
    task: Task of the teacher. Of dense tasks the modulation is per pixel.
    modulation: Multiplier of the one_hot term.
    priorities: How the student's images are drawn and weighed.
    reading: Choices that the paper's abstract leaves open.
    layout: Batch sizes, tasks and devices. Each task has a stripe of the buffer, within which
      priorities count.
    capacity: Images in the buffer of this device; 5,000 for CIFAR.
    Others: See `fast_dfkd`.
  """
  factors = factors.checked()
  asks = _asks(reading, task)
  counts_asked = reading.counted == 'asked' and modulation.diversity
  if reading.new_priority == 'modulation' and not modulation.is_used:
    raise FieldError('new_priority', "new_priority is 'modulation', must be 'max' or 'one' where "
                     'there is no modulation.')
  meta = inversion.MetaGenerator(
      generator=generator, image_shape=image_shape, task=task, latents=latents, inner=inner,
      outer=outer, layout=layout, average=average, capacity=capacity,
      moments_momentum=moments_momentum)

  def init(key, teacher):
    return meta.init(key, teacher, factors, prioritised=priorities.is_used)

  def invert(state, key, teacher, student, factors):
    """Runs the inner loops of one call."""
    inputs = meta.draw_inputs(state, key)
    factors = factors.late_adversary(state.step, adversarial_after)

    def loss_fn(variables, key_step, labels):
      images = meta.render(variables['params'], variables['latents'], labels)
      views = augment(key_step, images)
      outputs = teacher(views)
      targets = task.labels_from(outputs.logits, labels if asks else None)
      phi = modulation.phi(
          outputs.logits, targets, state.buffer.histogram, is_constant=reading.stop_modulation,
          counts_targets=reading.counted == 'asked', is_normalised=reading.normalised_diversity)
      terms = objective.terms(
          factors, outputs, views, targets, teacher=teacher, student=student,
          history=inputs.history, modulation=phi, adversary=adversary, reduce=task.reduce)
      loss, metrics = objective.total(terms, factors)
      kept = {'images': images, 'labels': task.predicted(outputs.logits), 'asked': labels,
              'modulation': None if phi is None else task.reduce(phi)}
      return loss, StepOutput(kept, outputs.moments, metrics)

    return meta.invert(inputs, loss_fn)

  def synthesize(state, key, teacher, student):
    inversions = invert(state, key, teacher, student, factors)
    state, kept = meta.update(state, inversions), inversions.kept
    labels = kept['asked' if counts_asked else 'labels']
    new_priorities = None  # 'max'
    if reading.new_priority == 'modulation':
      new_priorities = -kept['modulation']
    elif reading.new_priority == 'one':
      new_priorities = jnp.ones(labels.shape)
    buffer = replay.add(state.buffer, kept['images'], labels, layout.axis, new_priorities)
    return state.replace(buffer=buffer), inversions.metrics

  def sample(state, key):
    return meta.sample(state, key, priorities.sample)

  def weigh(state, batch, losses):
    """Sets the priorities of these images to w KL, then renews w as (N P)^-beta."""
    if not priorities.is_used:
      return state, jnp.ones_like(losses)
    weights = priority.weights_at(state.buffer, batch.slots)
    buffer = priority.set_priorities(state.buffer, batch.slots, weights * losses)
    renewed = priority.importance_weights(
        buffer, batch.slots, priorities.beta, priorities.epsilon)
    if priorities.clip_weights is not None:
      renewed = jnp.minimum(renewed, priorities.clip_weights)
    buffer = priority.set_weights(buffer, batch.slots, renewed)
    if reading.normalise_weights == 'max':
      weights /= parallel.pmax(weights.max(), layout.axis)
    return state.replace(buffer=buffer), weights

  def fresh(state, key, teacher, student=None):
    state, key = meta.with_fresh_latents(state, key)
    kept = invert(state, key, teacher, student, factors.for_student(student)).kept
    return replay.unsaved(kept['images'], kept['labels'])

  return Synthesizer(init, synthesize, sample, weigh, fresh, inversion.generator,
                     inversion.with_generator)


def _asks(reading: Reading, task: Task) -> bool:
  """Whether images are asked for random classes."""
  if reading.label_source == 'random' and not task.asks:
    raise FieldError('label_source', "label_source is 'random', must be 'argmax' or None: the "
                     'task has no classes to ask for.')
  asks = task.asks if reading.label_source is None else reading.label_source == 'random'
  if reading.counted == 'asked' and not asks:
    raise FieldError('counted', "counted is 'asked', must be 'seen' where no class is asked for.")
  return asks
