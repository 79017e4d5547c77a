"""Inversion of a teacher: from a copy of a generator, a few steps give a batch of images."""

import dataclasses

import jax.numpy as jnp
import optax

from dfkd_jax.messages import FieldError
from dfkd_jax.models.network import Network
from dfkd_jax.synth import inner_loop
from dfkd_jax.synth.objective import Factors
from dfkd_jax.types import Array, Moments, PRNGKey, PyTree


@dataclasses.dataclass(frozen=True)
class InnerLoop:
  """The inner loop: Adam on a copy of the generator and on one latent an image.

  Attributes:
    num_steps: Inner steps.
    generator_lr: Learning rate of the copy. Its optimizer state is fresh in every call.
    latent_lr: Learning rate of the latents; None: `generator_lr`.
    adam_b1: Decay of Adam's first moment, in the inner and the outer loop.
    adam_b2: Decay of Adam's second moment, in the inner and the outer loop.
    keep: Images of the 'best' inner step, or of the 'last'.
  """

  num_steps: int = 5
  generator_lr: float = 3e-3
  latent_lr: float | None = 1e-2
  adam_b1: float = 0.5
  adam_b2: float = 0.999
  keep: str = 'best'

  def __post_init__(self):
    inner_loop.check(self.num_steps, self.keep)

  def adam(self, learning_rate: float) -> optax.GradientTransformation:
    """Returns Adam with the decays of this loop."""
    return optax.adam(learning_rate, b1=self.adam_b1, b2=self.adam_b2)

  def optimizer(self) -> optax.GradientTransformation:
    """Returns the optimizer of variables {'params': ..., 'latents': ...}."""
    latent_lr = self.generator_lr if self.latent_lr is None else self.latent_lr
    return optax.partition(
        {'params': self.adam(self.generator_lr), 'latents': self.adam(latent_lr)},
        {'params': 'params', 'latents': 'latents'})

  def minimize(
      self, key: PRNGKey, loss_fn: inner_loop.LossFn, params: PyTree, latents: PyTree
  ) -> inner_loop.Minimum:
    """Runs one inversion.

    Args:
      key: Split into one key a step.
      loss_fn: (variables, key) -> (loss [], StepOutput), with variables
        {'params': ..., 'latents': ...}.
      params: Of the generator, where the copy starts.
      latents: [B, Z], where they start.
    """
    tx, variables = self.optimizer(), {'params': params, 'latents': latents}
    return inner_loop.minimize(
        key, loss_fn, variables, tx.init(variables), tx=tx, num_steps=self.num_steps,
        keep=self.keep)


def check_momentum(moments_momentum: float) -> None:
  """Raises a FieldError unless the momentum lies in [0, 1)."""
  if not 0 <= moments_momentum < 1:
    raise FieldError(
        'moments_momentum', f'moments_momentum is {moments_momentum}, must be in [0, 1).')


def momentum_at(step: Array, moments_momentum: float) -> Array:
  """Share of the past in the matched moments: 0 in the first call, which has no past."""
  return jnp.where(step == 0, 0, moments_momentum)


def average_moments(
    past: dict[str, Moments], moments: dict[str, Moments], step: Array, moments_momentum: float
) -> dict[str, Moments]:
  """Returns momentum * past + (1 - momentum) * moments, by layer."""
  new = jnp.where(step == 0, 1, 1 - moments_momentum)
  return optax.incremental_update(moments, past, new)


def with_late_adversary(factors: Factors, step: Array, adversarial_after: int) -> Factors:
  """Switches the adversarial term off for the first `adversarial_after` calls."""
  if not factors.active('adversarial'):
    return factors
  return factors._replace(adversarial=factors.adversarial * (step >= adversarial_after))


def for_student(factors: Factors, student: Network | None) -> Factors:
  """Switches the terms off that need a student, if there is none."""
  if student is not None:
    return factors
  return factors._replace(adversarial=0.0, student_batch_norm=0.0)
