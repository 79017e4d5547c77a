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

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfkd_jax import augment as augmentations
from dfkd_jax import parallel
from dfkd_jax.messages import FieldError, check_option
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generators, inversion, moving_average, objective, outer_loop, replay
from dfkd_jax.synth import priorities as priority
from dfkd_jax.synth.inner_loop import StepOutput
from dfkd_jax.synth.inversion import InnerLoop
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.modulation import Modulation
from dfkd_jax.synth.moving_average import MovingAverage
from dfkd_jax.synth.objective import Adversary, Factors, History
from dfkd_jax.synth.outer_loop import Inversions, OuterLoop
from dfkd_jax.synth.priorities import Priorities
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array, Batch, Metrics, PRNGKey


@dataclasses.dataclass(frozen=True)
class Reading:
  """Choices that the paper's abstract leaves open; unverified.

  Attributes:
    counted: Class that the diversity counts: 'seen' by the teacher, or 'asked' for.
    label_source: Targets are 'random' classes, as in FastDFKD, or the teacher's 'argmax'. None:
      'random' where the task has classes to ask for.
    stop_modulation: Whether the modulation is a constant. By default the gradient flows through
      the difficulty, as in the focal loss.
    new_priority: Of an image until it is drawn: the stripe's 'max', that times its 'modulation',
      or 'one' on the scale of the student's loss.
    normalise_weights: 'none', or 'max' to divide a batch's weights by their largest, as in the
      second reference.
    normalised_diversity: Whether to take our variant of `losses.curriculum.diversity`.
  """

  counted: str = 'seen'
  label_source: str | None = None
  stop_modulation: bool = False
  new_priority: str = 'max'
  normalise_weights: str = 'none'
  normalised_diversity: bool = False

  def __post_init__(self):
    check_option('counted', self.counted, ('seen', 'asked'))
    check_option('label_source', self.label_source, ('random', 'argmax', None))
    check_option('new_priority', self.new_priority, ('max', 'modulation', 'one'))
    check_option('normalise_weights', self.normalise_weights, ('none', 'max'))


State = outer_loop.State


def ssd_kd(
    *,
    generator: nn.Module,
    image_shape: tuple[int, int, int],
    task: Task,
    factors: Factors,
    modulation: Modulation = Modulation(),
    priorities: Priorities = Priorities(),
    reading: Reading = Reading(),
    latents: Latents = Latents(),
    inner: InnerLoop = InnerLoop(),
    outer: OuterLoop = OuterLoop(),
    layout: Layout = Layout(),
    average: MovingAverage = MovingAverage(),
    capacity: int = 5_000,
    moments_momentum: float = 0.9,
    adversarial_after: int = 19,
    adversary: Adversary = Adversary(),
    augment: Callable[[PRNGKey, Array], Array] = augmentations.crop_and_flip,
) -> Synthesizer:
  """Makes the SSD-KD synthesizer; numbers that the paper's abstract lacks are FastDFKD's.

  Args:
    generator: Maps latents [B, Z] (or [B, h, w, Z]) to images [B, H, W, C] in (0, 1).
    image_shape: [H, W, C] of its images.
    task: Task of the teacher. Of dense tasks the modulation is per pixel.
    factors: Factors of the terms.
    modulation: Multiplier of the one_hot term.
    priorities: How the student's images are drawn and weighed.
    reading: Choices that the paper's abstract leaves open.
    layout: Batch sizes, tasks and devices. Each task has a stripe of the buffer, within which
      priorities count.
    capacity: Images in the buffer of this device; 5,000 for CIFAR.
    latents, inner, outer, average, moments_momentum, adversarial_after, adversary, augment: See
      `fast_dfkd`.
  """
  factors = factors.checked()
  inversion.check_momentum(moments_momentum)
  asks = _asks(reading, task)
  if reading.new_priority == 'modulation' and not modulation.is_used:
    raise FieldError('new_priority', "new_priority is 'modulation', must be 'max' or 'one' where "
                     'there is no modulation.')
  stripe = layout.share(capacity, 'capacity')
  num_averaged = average.num_images(layout, outer.is_new_every_call)
  latent_shape = latents.batch_shape(layout.batch_size)
  meta_tx = outer.optimizer(inner)

  def init(key: PRNGKey, teacher: Network) -> State:
    key_params, key_latents = jax.random.split(key)
    params = generators.init(generator, key_params, latent_shape)
    outputs = generators.check(
        generator, params, latent_shape, image_shape, teacher, task.num_classes, factors)
    buffer = replay.create(
        stripe, image_shape, task.num_classes, layout.num_tasks, prioritised=priorities.is_used)
    return State(
        latents=latents.start(key_latents, layout), step=jnp.int32(0), meta_params=params,
        meta_opt_state=meta_tx.init(params), past=jax.tree.map(jnp.zeros_like, outputs.moments),
        buffer=buffer, ema=average.init(params))

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
      targets = task.labels_from(outputs.logits, labels if asks else None)
      phi = modulation.phi(
          outputs.logits, targets, state.buffer.histogram, is_constant=reading.stop_modulation,
          counts_targets=reading.counted == 'asked', is_normalised=reading.normalised_diversity)
      terms = objective.terms(
          factors, outputs, views, targets, teacher=teacher, student=student, history=history,
          modulation=phi, adversary=adversary, reduce=task.reduce)
      loss, metrics = objective.total(terms, factors)
      kept = {'images': images, 'labels': task.predicted(outputs.logits), 'asked': labels,
              'modulation': None if phi is None else task.reduce(phi)}
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
    counts_asked = reading.counted == 'asked' and modulation.diversity
    labels = found.kept['asked' if counts_asked else 'labels']
    new_priorities = None  # 'max'
    if reading.new_priority == 'modulation':
      new_priorities = -found.kept['modulation']
    elif reading.new_priority == 'one':
      new_priorities = jnp.ones(labels.shape)
    buffer = replay.add(state.buffer, found.kept['images'], labels, layout.axis, new_priorities)
    return state.replace(buffer=buffer), found.metrics

  def sample(state: State, key: PRNGKey) -> Batch:
    return moving_average.sample(
        key, layout, num_averaged,
        lambda key, number: priorities.sample(key, state.buffer, number, layout.axis),
        lambda key_latents, key_labels, number: layout.map(
            lambda inputs: generators.render(generator, state.ema, latents.decode(*inputs)),
            latents.draw_with_labels(
                key_latents, key_labels, number, task, state.buffer.histogram, layout)))

  def weigh(state: State, batch: Batch, losses: Array) -> tuple[State, Array]:
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

  def fresh(
      state: State, key: PRNGKey, teacher: Network, student: Network | None = None
  ) -> Batch:
    key_latents, key = jax.random.split(key)
    state = state.replace(latents=latents.start(key_latents, layout))
    _, found = advance(state, key, teacher, student, inversion.for_student(factors, student))
    return replay.unsaved(found.kept['images'], found.kept['labels'])

  return Synthesizer(
      init, synthesize, sample, weigh, fresh,
      generator=lambda state: {'params': state.meta_params},
      with_generator=lambda state, variables: state.replace(meta_params=variables['params']))


def _asks(reading: Reading, task: Task) -> bool:
  """Whether images are asked for random classes."""
  if reading.label_source == 'random' and not task.asks:
    raise FieldError('label_source', "label_source is 'random', must be 'argmax' or None: the "
                     'task has no classes to ask for.')
  asks = task.asks if reading.label_source is None else reading.label_source == 'random'
  if reading.counted == 'asked' and not asks:
    raise FieldError('counted', "counted is 'asked', must be 'seen' where no class is asked for.")
  return asks
