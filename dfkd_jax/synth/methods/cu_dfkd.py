"""CuDFKD: easy samples first, for the student and from the generator.

An adversarial generator as DFQ's, with two dials that go from easy to hard. The student weighs
each sample by its own loss against a threshold that grows with its steps; the generator's
adversarial factor starts low and grows between two epochs. Each is a switch of its own (the
published code ties them together).

References:
  Li et al., Dynamic Data-Free Knowledge Distillation by Easy-to-Hard Learning Strategy,
  Information Sciences 2023, https://arxiv.org/abs/2208.13648, and its code for all numbers. The
  paper weighs samples; its newest code weighs batches, by the mean of their losses, which makes
  the curriculum a factor of the learning rate: `per='batch'`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from dfkd_jax import parallel
from dfkd_jax.losses.curriculum import KINDS, self_paced_weights
from dfkd_jax.messages import FieldError, check_option
from dfkd_jax.synth import generator_training, generators
from dfkd_jax.synth.generator_training import GeneratorTraining
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.moving_average import MovingAverage
from dfkd_jax.synth.objective import Adversary, Factors
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.tasks import Task
from dfkd_jax.types import Array

PER = ('sample', 'batch')


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """The student's curriculum: `losses.curriculum.self_paced_weights` with a growing threshold."""

  curriculum_kind: str | None = 'log'  # 'log', 'soft' or 'hard'; None: every sample weighs 1
  threshold_start: float = 2.0  # lambda at the student's first step
  threshold_growth: float = 1e-4  # in each step of the student, for CIFAR-10; 2e-5 otherwise
  per: str = 'sample'  # as in the paper, or 'batch': one weight by the mean loss of a batch

  def __post_init__(self):
    check_option('curriculum_kind', self.curriculum_kind, (None, *KINDS))
    check_option('per', self.per, PER)
    if self.threshold_start <= 0:
      raise FieldError('threshold_start', f'threshold_start is {self.threshold_start}, must be '
                       'above 0.')
    if self.threshold_growth < 0:
      raise FieldError('threshold_growth', f'threshold_growth is {self.threshold_growth}, must be '
                       'at least 0.')


class State(struct.PyTreeNode):
  """The generator, and the student's progress."""

  online: generator_training.State
  student_step: Array  # [] int32


def cu_dfkd(
    *, generator: nn.Module, image_shape: tuple[int, int, int], task: Task,
    factors: Factors = Factors(batch_norm=1.0, one_hot=1.0, balance=20.0, adversarial=1.0),
    adversary: Adversary = Adversary('kl', 3.0, True), curriculum: Curriculum = Curriculum(),
    latents: Latents = Latents(512), layout: Layout = Layout(),
    training: GeneratorTraining = GeneratorTraining(
        adam_b1=0.9, adam_b2=0.99, balance_temperature=20.0),
    average: MovingAverage = MovingAverage(), init_std: float | None = None,
) -> Synthesizer:
  """Makes the CuDFKD synthesizer, by default like the published CIFAR-10 script.

  Four defaults differ: `per` is the paper's; `init_std`, see there; the ramp `adversarial`
  has no default, since its dials are fractions of a run; batches are of 256 images, not of 512 or
  1,024.

  Args:
    generator: Maps latents [B, Z] (or [B, h, w, Z]) to images [B, H, W, C] in (0, 1).
    image_shape: [H, W, C] of its images.
    task: Task of the teacher; targets are the classes that it sees.
    factors: Of batch_norm, one_hot, balance and adversarial.
    adversary: KL at temperature 3 (so times 9), of images on which both agree.
    curriculum: The student's curriculum.
    latents: Shape of the latents.
    training: How the generator is trained. `balance_temperature` is published as equal
      to the student's temperature, 20, 5 or 2.
    layout: Batch sizes, tasks and devices.
    average: Moving average of the generator, if any.
    init_std: The generator starts from `generators.redraw` with this deviation, published as
      0.02. None: from its own initialisers, since narrow ones make plain grey until their running
      moments have settled.
  """
  if init_std is not None and init_std <= 0:
    raise FieldError('init_std', f'init_std is {init_std}, must be above 0, or None.')
  online = generator_training.synthesizer(
      generator=generator, image_shape=image_shape, task=task, factors=factors,
      adversary=adversary, latents=latents, training=training, layout=layout, average=average)

  def init(key, teacher):
    state = online.init(key, teacher)
    if init_std is not None:
      params = generators.redraw(jax.random.fold_in(key, 1), state.params, init_std)
      state = state.replace(params=params)
      state = state.replace(ema=average.init(state.variables))
    return State(state, jnp.int32(0))

  def synthesize(state, key, teacher, student):
    online_state, metrics = online.synthesize(state.online, key, teacher, student)
    return state.replace(online=online_state), metrics

  def sample(state, key):
    return online.sample(state.online, key)

  def weigh(state, batch, losses):
    del batch
    threshold = curriculum.threshold_start + curriculum.threshold_growth * state.student_step
    state = state.replace(student_step=state.student_step + 1)
    if curriculum.curriculum_kind is None:
      return state, jnp.ones_like(losses)
    if curriculum.per == 'batch':
      mean = parallel.pmean(losses.mean(), layout.axis)
      losses = jnp.full_like(losses, mean)
    return state, self_paced_weights(losses, threshold, curriculum.curriculum_kind)

  def with_generator(state, variables):
    return state.replace(online=online.with_generator(state.online, variables))

  return Synthesizer(
      init, synthesize, sample, weigh,
      generator=lambda state: online.generator(state.online), with_generator=with_generator)
