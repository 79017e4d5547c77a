"""The inner loop of all methods: gradient steps that keep the images of the best one."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from dfkd_jax.messages import FieldError, check_option
from dfkd_jax.types import Array, Metrics, PRNGKey, PyTree

KEEP = ('best', 'last')


class StepOutput(NamedTuple):
  """Results of a loss function beside its value."""

  kept: PyTree  # kept from the best (or last) step: the images, and values that belong to them
  aux: Any  # kept from the last step
  metrics: Metrics  # of every step, each []


class Minimum(struct.PyTreeNode):
  """Results of `minimize`."""

  kept: PyTree  # `StepOutput.kept` of the step with the lowest loss
  loss: Array  # [], of that step
  variables: PyTree  # after the last step
  opt_state: PyTree
  grads: PyTree  # summed over the steps: the gradient of first-order MAML
  aux: Any  # of the last step
  metrics: Metrics  # each [num_steps], before that step's update


LossFn = Callable[[PyTree, PRNGKey], tuple[Array, StepOutput]]


def check(num_steps: int, keep: str = 'best') -> None:
  """Raises a FieldError unless there is a step, and `keep` is known."""
  if num_steps < 1:
    raise FieldError('num_steps', f'num_steps is {num_steps}, must be at least 1.')
  check_option('keep', keep, KEEP)


def minimize(
    key: PRNGKey,
    loss_fn: LossFn,
    variables: PyTree,
    opt_state: PyTree,
    *,
    tx: optax.GradientTransformation,
    num_steps: int,
    keep: str = 'best',
    project: Callable[[PyTree], PyTree] = lambda variables: variables,
) -> Minimum:
  """Follows the gradient for `num_steps` and keeps the images of the best step.

  Loss and images of a step are those before its update, so the variables after the last update
  are never rendered. The lowest loss is picked across steps with different augmentations, as
  published (arXiv:2112.06253, algorithm 1, and its code).

  Args:
    key: Split into one key a step.
    loss_fn: (variables, key) -> (loss [], StepOutput).
    variables: Any pytree: pixels, latents, parameters of a generator.
    opt_state: Of `tx`, for `variables`.
    tx: The optimizer.
    num_steps: At least 1.
    keep: 'best' (lowest loss that is not NaN; the first step if all are) or 'last'.
    project: Maps the variables back into their domain after each update.
  """
  check(num_steps, keep)
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def step(carry: Minimum, inputs: tuple[Array, PRNGKey]) -> tuple[Minimum, Metrics]:
    index, step_key = inputs
    (loss, output), grads = grad_fn(carry.variables, step_key)
    is_lower = (loss < carry.loss) | (jnp.isnan(carry.loss) & ~jnp.isnan(loss))
    is_kept = (index == 0) | is_lower if keep == 'best' else jnp.bool_(True)
    pick = lambda new, old: jnp.where(is_kept, new, old)
    updates, opt_state = tx.update(grads, carry.opt_state, carry.variables)
    return Minimum(
        kept=jax.tree.map(pick, output.kept, carry.kept),
        loss=pick(loss, carry.loss),
        variables=project(optax.apply_updates(carry.variables, updates)),
        opt_state=opt_state,
        grads=jax.tree.map(jnp.add, carry.grads, grads),
        aux=output.aux,
        metrics={}), {'loss': loss, **output.metrics}

  zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
  loss, output = jax.eval_shape(loss_fn, variables, key)
  start = Minimum(zeros(output.kept), zeros(loss), variables, opt_state, zeros(variables),
                  zeros(output.aux), {})
  minimum, metrics = lax.scan(
      step, start, (jnp.arange(num_steps), jax.random.split(key, num_steps)))
  return minimum.replace(metrics=metrics)


@dataclasses.dataclass(frozen=True)
class InnerLoop:
  """The inner loop of a generator: Adam on a copy of it, and on one latent an image."""

  num_steps: int = 5
  generator_lr: float = 3e-3  # of the copy, whose optimizer state is fresh in every call
  latent_lr: float | None = 1e-2  # None: `generator_lr`
  adam_b1: float = 0.5  # decay of Adam's first moment, in the inner and the outer loop
  adam_b2: float = 0.999  # decay of the second one
  keep: str = 'best'  # images of the 'best' inner step, or of the 'last'

  def __post_init__(self):
    check(self.num_steps, self.keep)

  def adam(self, learning_rate: float) -> optax.GradientTransformation:
    """Returns Adam with the decays of this loop."""
    return optax.adam(learning_rate, b1=self.adam_b1, b2=self.adam_b2)

  def optimizer(self) -> optax.GradientTransformation:
    """Returns the optimizer of variables {'params': ..., 'latents': ...}."""
    latent_lr = self.generator_lr if self.latent_lr is None else self.latent_lr
    return optax.partition(
        {'params': self.adam(self.generator_lr), 'latents': self.adam(latent_lr)},
        {'params': 'params', 'latents': 'latents'})
