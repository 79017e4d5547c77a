"""The one inner loop of all methods."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from dfkd_jax.types import Array, Metrics, PRNGKey, PyTree


class StepOutput(NamedTuple):
  """What a loss function has to show beside its value."""

  kept: PyTree  # of the best (or last) step: the images, and what goes with them
  aux: Any  # of the last step
  metrics: Metrics  # of every step, each []


class Minimum(struct.PyTreeNode):
  """What `minimize` found."""

  kept: PyTree  # `Seen.kept` of the step with the lowest loss
  loss: Array  # [], of that step
  variables: PyTree  # after the last step
  opt_state: PyTree
  grads: PyTree  # summed over the steps; the gradient of first-order MAML
  aux: Any  # of the last step
  metrics: Metrics  # each [num_steps], before that step's update


LossFn = Callable[[PyTree, PRNGKey], tuple[Array, StepOutput]]


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

  The loss of a step, and what is kept of it, are those before its update, so that
  the variables after the last update are never rendered. The lowest loss is
  picked across steps whose augmentations differ, as published
  (arXiv:2112.06253, algorithm 1, and its code).

  Args:
    key: Split into one key per step.
    loss_fn: (variables, key) -> (loss [], Seen).
    variables: Any pytree: pixels, latents, parameters of a generator.
    opt_state: Of `tx`, for `variables`.
    tx: The optimizer.
    num_steps: At least 1.
    keep: 'best' (strictly lowest loss that is a number, else the first step) or 'last'.
    project: Takes the variables after each update back to where they may lie.
  """
  if num_steps < 1:
    raise ValueError(f'num_steps is {num_steps}, must be at least 1.')
  if keep not in ('best', 'last'):
    raise ValueError(f"keep is {keep!r}, must be 'best' or 'last'.")
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def step(carry: Minimum, inputs: tuple[Array, PRNGKey]) -> tuple[Minimum, Metrics]:
    index, step_key = inputs
    (loss, seen), grads = grad_fn(carry.variables, step_key)
    lower = (loss < carry.loss) | (jnp.isnan(carry.loss) & ~jnp.isnan(loss))
    better = (index == 0) | lower if keep == 'best' else jnp.bool_(True)
    pick = lambda new, old: jnp.where(better, new, old)
    updates, opt_state = tx.update(grads, carry.opt_state, carry.variables)
    return Minimum(
        kept=jax.tree.map(pick, seen.kept, carry.kept),
        loss=pick(loss, carry.loss),
        variables=project(optax.apply_updates(carry.variables, updates)),
        opt_state=opt_state,
        grads=jax.tree.map(jnp.add, carry.grads, grads),
        aux=seen.aux,
        metrics={}), {'loss': loss, **seen.metrics}

  zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
  loss, seen = jax.eval_shape(loss_fn, variables, key)
  first = Minimum(zeros(seen.kept), zeros(loss), variables, opt_state, zeros(variables), zeros(seen.aux), {})
  found, metrics = lax.scan(step, first, (jnp.arange(num_steps), jax.random.split(key, num_steps)))
  return found.replace(metrics=metrics)


def by_part(parts: dict[str, optax.GradientTransformation]) -> optax.GradientTransformation:
  """One optimizer for each entry of variables {name: PyTree}; its state is a dict of the same keys."""

  def init(variables):
    return {name: tx.init(variables[name]) for name, tx in parts.items()}

  def update(grads, state, variables=None):
    found = {name: tx.update(grads[name], state[name], None if variables is None else variables[name])
             for name, tx in parts.items()}
    return {name: updates for name, (updates, _) in found.items()}, {name: new for name, (_, new) in found.items()}

  return optax.GradientTransformation(init, update)


def task_mapper(task_map: str) -> Callable:
  """`jax.vmap` or `lax.map` for the tasks of one device.

  Args:
    task_map: 'vmap', 'map', or 'auto': `map` on CPU, where the convolutions of a
      vmapped generator become slow grouped ones, and `vmap` elsewhere.
  """
  if task_map not in ('auto', 'vmap', 'map'):
    raise ValueError(f"task_map is {task_map!r}, must be 'auto', 'vmap' or 'map'.")
  if task_map == 'auto':
    task_map = 'map' if jax.default_backend() == 'cpu' else 'vmap'
  return (lambda function, xs: jax.lax.map(function, xs)) if task_map == 'map' else (
      lambda function, xs: jax.vmap(function)(xs))


def map_tasks(mapper: Callable, function: Callable[[PyTree], PyTree], inputs: PyTree) -> PyTree:
  """`function` over the first axis [M] of the inputs; a single task needs no loop and no grouped convolutions."""
  if jax.tree.leaves(inputs)[0].shape[0] > 1:
    return mapper(function, inputs)
  found = function(jax.tree.map(lambda a: a[0], inputs))
  return jax.tree.map(lambda a: a[None], found)


def mean_over_tasks(leaf: Array) -> Array:
  """Mean over the first axis; of integers, which are counts and alike in all tasks, the first."""
  return leaf.mean(0) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf[0]
