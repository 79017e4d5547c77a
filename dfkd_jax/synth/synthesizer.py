"""What a method of data-free distillation is: four pure functions."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from dfkd_jax.models.network import Network
from dfkd_jax.types import Array, Batch, Metrics, PRNGKey, PyTree


def no_weights(state: PyTree, batch: Batch, losses: Array) -> tuple[PyTree, Array]:
  """Every sample counts alike: the state as it is, and ones [B]."""
  del batch
  return state, jnp.ones_like(losses)


class Synthesizer(NamedTuple):
  """A method: where images come from, and how the student's samples are weighed.

  The state is a pytree that holds neither the teacher, which never changes, nor
  PRNG keys. All functions can be jitted, and mapped over devices if the method
  was made with `axis`.
  """

  init: Callable[[PRNGKey, Network], PyTree]
  """(key, teacher) -> state."""

  synthesize: Callable[[PyTree, PRNGKey, Network, Network | None], tuple[PyTree, Metrics]]
  """(state, key, teacher, student) -> (state, metrics); each metric [num_steps], one value per inner step."""

  sample: Callable[[PyTree, PRNGKey], Batch]
  """(state, key) -> Batch for one step of the student."""

  weigh: Callable[[PyTree, Batch, Array], tuple[PyTree, Array]] = no_weights
  """(state, batch, the student's losses [B]) -> (state, weights [B])."""


def passes_on(inner: Callable, without: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
  """Declares that `**numbers` of a constructor go to `inner`: its signature shows them, each with its default.

  Args:
    inner: Takes what the constructor does not name itself.
    without: Arguments of `inner` that the constructor sets, and nobody else may.
  """

  def declare(constructor: Callable) -> Callable:
    own = {name: found for name, found in inspect.signature(constructor).parameters.items()
           if found.kind is not inspect.Parameter.VAR_KEYWORD}
    further = {name: found for name, found in inspect.signature(inner).parameters.items()
               if name not in own and name not in without}
    constructor.__signature__ = inspect.signature(constructor).replace(parameters=[*own.values(), *further.values()])
    return constructor

  return declare
