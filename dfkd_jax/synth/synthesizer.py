"""The interface of a method of data-free distillation: a few pure functions."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from dfkd_jax.models.network import Network
from dfkd_jax.types import Array, Batch, Metrics, PRNGKey, PyTree


class Synthesizer(NamedTuple):
  """A method: how images are synthesised, and how the student's samples are weighed.

  The state is a pytree that holds neither the teacher, which never changes, nor PRNG keys. All
  functions can be jitted, and mapped over devices if the method was made with `axis`. A method
  needs only the first three functions.
  """

  init: Callable[[PRNGKey, Network], PyTree]
  """(key, teacher) -> state."""

  synthesize: Callable[[PyTree, PRNGKey, Network, Network | None], tuple[PyTree, Metrics]]
  """(state, key, teacher, student) -> (state, metrics). Each metric is [num_steps], one value an
  inner step; metrics may be empty."""

  sample: Callable[[PyTree, PRNGKey], Batch]
  """(state, key) -> Batch for one step of the student."""

  weigh: Callable[[PyTree, Batch, Array], tuple[PyTree, Array]] = (
      lambda state, batch, losses: (state, jnp.ones_like(losses)))
  """(state, batch, the student's losses [B]) -> (state, weights [B])."""

  fresh: Callable[..., Batch] | None = None
  """(state, key, teacher, student=None) -> Batch of new images that no student has seen, with
  slots of -1. Without a student, terms that need one are left out. None: every `sample` is
  fresh."""

  generator: Callable[[PyTree], PyTree | None] = lambda state: None
  """(state) -> the variables of a generator that lasts from call to call, {'params': ...} and
  perhaps 'batch_stats'; None if there is none."""

  with_generator: Callable[[PyTree, PyTree], PyTree] = lambda state, variables: state
  """(state, variables) -> the state with these variables in its generator."""

  def fresh_images(
      self, state: PyTree, key: PRNGKey, teacher: Network, student: Network | None = None
  ) -> Batch:
    """Returns new images, by `fresh` or, where the method leaves it out, by `sample`."""
    if self.fresh is None:
      return self.sample(state, key)
    return self.fresh(state, key, teacher, student)
