"""CuDFKD: easy samples first, for the student and from the generator.

An adversarial generator as DFQ's, with two dials that go from easy to hard. The
student weighs each sample by its own loss against a threshold that grows with its
steps; the generator's adversarial factor starts low and grows between two epochs.
Each is a switch of its own (the published code ties them together).

References:
  Li et al., Dynamic Data-Free Knowledge Distillation by Easy-to-Hard Learning
  Strategy, Information Sciences 2023, https://arxiv.org/abs/2208.13648, and its code
  for all numbers. The paper weighs samples; its newest code weighs batches, by the mean of
  their losses, which makes the curriculum a factor of the learning rate: `per='batch'`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dfkd_jax import parallel
from dfkd_jax.losses import curriculum
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generator_training, generators, objective
from dfkd_jax.synth.synthesizer import Synthesizer, passes_on
from dfkd_jax.types import Array, Batch, Metrics, PRNGKey

PER = ('sample', 'batch')


class State(struct.PyTreeNode):
  """A generator, and how far the student has come."""

  online: generator_training.State
  student_step: Array  # [] int32


@passes_on(generator_training.synthesizer)
def cu_dfkd(
    *,
    factors: objective.Factors = objective.Factors(batch_norm=1.0, one_hot=1.0, balance=20.0, adversarial=1.0),
    adversary: objective.Adversary = objective.Adversary('kl', 3.0, True),
    adversarial: optax.Schedule | None = None,
    balance_temperature: float = 20.0,
    curriculum_kind: str | None = 'log',
    threshold_start: float = 2.0,
    threshold_growth: float = 1e-4,
    per: str = 'sample',
    latent_dim: int = 512,
    adam_b1: float = 0.9,
    adam_b2: float = 0.99,
    init_std: float | None = None,
    axis: str | None = None,
    **numbers: Any,
) -> Synthesizer:
  """Makes the CuDFKD synthesizer; defaults are those of the published CIFAR-10 script, but for these.

  `per` is the paper's; `init_std`, see there; there is no default for the ramp `adversarial`, whose dials are shares of
  a run; and batches are of 256 images (`online.synthesizer`), not of 512 or 1,024.

  Args:
    factors: Of batch_norm, one_hot, balance and adversarial.
    adversary: KL at temperature 3 (so times 9), of images on which both agree.
    adversarial: Calls so far -> factor of the adversarial term, such as `schedules.ramp(...)`; None: that of `factors`.
    balance_temperature: T of the balance term; published as that of the student's loss, 20, 5 or 2.
    curriculum_kind: 'log', 'soft' or 'hard', see `losses.curriculum.self_paced_weights`; None: every sample counts 1.
    threshold_start: lambda at the student's first step.
    threshold_growth: What each step of the student adds to lambda: 1e-4 for CIFAR-10, 2e-5 otherwise.
    per: 'sample', or 'batch' for one weight by the mean loss of a batch.
    latent_dim: Z.
    adam_b1: Decay of Adam's first moment, for the generator.
    adam_b2: Decay of Adam's second moment.
    init_std: The generator starts from `generative.redraw` with this deviation, published 0.02; None: as it draws
      itself, since narrow ones make plain grey from such weights, until their running moments have settled.
    axis: The mapped axis of devices, if any.
    **numbers: Of `online.synthesizer`.
  """
  if curriculum_kind is not None and curriculum_kind not in curriculum.KINDS:
    raise ValueError(f'curriculum_kind is {curriculum_kind!r}, must be None or one of {curriculum.KINDS}.')
  if per not in PER:
    raise ValueError(f'per is {per!r}, must be one of {PER}.')
  if threshold_start <= 0 or threshold_growth < 0:
    raise ValueError(
        f'threshold_start is {threshold_start}, must be above 0, and threshold_growth {threshold_growth}, at least 0.')
  if init_std is not None and init_std <= 0:
    raise ValueError(f'init_std is {init_std}, must be above 0, or None.')
  generator = generator_training.synthesizer(
      factors=factors, adversary=adversary, adversarial=adversarial, balance_temperature=balance_temperature,
      latent_dim=latent_dim, adam_b1=adam_b1, adam_b2=adam_b2, axis=axis, **numbers)

  def init(key: PRNGKey, teacher: Network) -> State:
    drawn = generator.init(key, teacher)
    if init_std is not None:
      params = generators.redraw(jax.random.fold_in(key, 1), drawn.params, init_std)
      ema = drawn.ema and drawn.ema | {'params': jax.tree.map(jnp.copy, params)}
      drawn = drawn.replace(params=params, ema=ema)
    return State(drawn, jnp.int32(0))

  def synthesize(
      state: State, key: PRNGKey, teacher: Network, student: Network | None
  ) -> tuple[State, Metrics]:
    online_state, metrics = generator.synthesize(state.online, key, teacher, student)
    return state.replace(online=online_state), metrics

  def sample(state: State, key: PRNGKey) -> Batch:
    return generator.sample(state.online, key)

  def weigh(state: State, batch: Batch, losses: Array) -> tuple[State, Array]:
    del batch
    threshold = threshold_start + threshold_growth * state.student_step
    state = state.replace(student_step=state.student_step + 1)
    if curriculum_kind is None:
      return state, jnp.ones_like(losses)
    if per == 'batch':
      losses = jnp.full_like(losses, parallel.pmean(losses.mean(), axis))
    return state, curriculum.self_paced_weights(losses, threshold, curriculum_kind)

  return Synthesizer(init, synthesize, sample, weigh)
