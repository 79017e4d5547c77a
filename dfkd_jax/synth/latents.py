"""Latents of a generator: drawn afresh in each call, or carried from call to call."""

import dataclasses
from collections.abc import Callable

import jax
from jax import lax

from dfkd_jax.messages import FieldError
from dfkd_jax.synth.layout import Layout
from dfkd_jax.types import Array, PRNGKey, PyTree


@dataclasses.dataclass(frozen=True)
class Latents:
  """Shape and life of the latents.

  With `carry_latents` a call starts from the latents of the call before. Every `restart_every`
  calls these and the outer Adam start afresh. `sample_latents` may return anything that `decode`
  turns into latents of the generator; the inner steps move it.
  """

  latent_dim: int | tuple[int, ...] = 256  # Z, or the shape of one latent, such as (h, w, Z)
  carry_latents: bool = False
  restart_every: int | None = None  # None: never
  sample_latents: Callable[[PRNGKey, tuple[int, ...]], PyTree] = jax.random.normal
  decode: Callable[[PyTree, Array], Array] = lambda latents, labels: latents

  def __post_init__(self):
    if self.restart_every is not None and not self.carry_latents:
      raise FieldError('restart_every', f'restart_every is {self.restart_every}, '
                       'must be None where carry_latents is False.')

  def batch_shape(self, number: int) -> tuple[int, ...]:
    """Shape of `number` latents, [number, Z] or [number, h, w, Z]."""
    single = (self.latent_dim,) if isinstance(self.latent_dim, int) else tuple(self.latent_dim)
    return (number, *single)

  def draw(self, key: PRNGKey, number: int, layout: Layout) -> PyTree:
    """Draws latents [M, number, Z]."""
    return layout.draw(key, lambda k: self.sample_latents(k, self.batch_shape(number)))

  def start(self, key: PRNGKey, layout: Layout) -> PyTree | None:
    """Draws the latents [M, B, Z] that a state carries; None if it carries none."""
    return self.draw(key, layout.batch_size, layout) if self.carry_latents else None

  def of_call(self, key: PRNGKey, carried: PyTree | None, step: Array, layout: Layout) -> PyTree:
    """Returns the latents [M, B, Z] of call `step`: new ones, or those of the call before."""
    if not self.carry_latents:
      return self.draw(key, layout.batch_size, layout)
    if self.restart_every is None:
      return carried
    return lax.cond(
        self.is_restart(step), lambda: self.draw(key, layout.batch_size, layout), lambda: carried)

  def is_restart(self, step: Array) -> Array:
    """Whether latents and outer optimizer start afresh; the published count is from one."""
    return (step + 1) % self.restart_every == 0
