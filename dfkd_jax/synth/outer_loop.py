"""The outer loop: how a generator goes on from call to call.

By first-order MAML or Reptile the meta-generator follows the inner loops through an optax
update of the gradient averaged over tasks and devices. Without an outer optimizer it becomes
the generator after the inner steps, or is drawn anew.

References:
  Fang et al., Up to 100x Faster Data-free Knowledge Distillation, AAAI 2022,
  https://arxiv.org/abs/2112.06253, section 3.2.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from dfkd_jax.messages import FieldError, check_option
from dfkd_jax.synth import generators
from dfkd_jax.synth.inner_loop import InnerLoop, Minimum
from dfkd_jax.types import Array, PRNGKey, PyTree

META = ('fomaml', 'reptile', 'sequential', 'reinit')


@dataclasses.dataclass(frozen=True)
class OuterLoop:
  """The outer loop.

  'sequential' keeps the generator after the inner steps, without an outer optimizer. 'reinit' does
  the same with a generator that is drawn anew, every `redraw_every` calls.
  """

  meta: str = 'fomaml'  # 'fomaml', 'reptile', 'sequential' or 'reinit'
  meta_lr: float | None = None  # None: `generator_lr * num_steps`, as published
  reptile_scale: float = 67.0  # of the gradient; under Adam it matters through epsilon only
  redraw_every: int | None = None  # None: in every call
  redraw_std: float | None = 0.02  # of `generators.redraw`; None: the generator's initialisers
  reset_after: int | None = None  # calls before the first layers are redrawn, once; None: never

  def __post_init__(self):
    check_option('meta', self.meta, META)
    is_reinit = self.meta == 'reinit'
    if is_reinit and self.reset_after is not None:
      raise FieldError(
          'reset_after', f"reset_after is {self.reset_after}, must be None where meta is 'reinit'.")
    if self.redraw_every is not None and (not is_reinit or self.redraw_every < 1):
      raise FieldError('redraw_every', f'redraw_every is {self.redraw_every}, must be at least 1, '
                       "and None where meta is not 'reinit'.")
    if self.redraw_std is not None and self.redraw_std <= 0:
      raise FieldError(
          'redraw_std', f'redraw_std is {self.redraw_std}, must be above 0, or None.')

  @property
  def is_new_every_call(self) -> bool:
    """Whether each call has a generator of its own."""
    return self.meta == 'reinit' and self.redraw_every in (None, 1)

  def optimizer(self, inner: InnerLoop) -> optax.GradientTransformation:
    """Returns the outer Adam."""
    published = inner.generator_lr * inner.num_steps
    return inner.adam(published if self.meta_lr is None else self.meta_lr)

  def is_new(self, step: Array) -> Array:
    """Whether the generator of call `step` does not go on from the call before."""
    if self.meta == 'reinit':
      return step % (self.redraw_every or 1) == 0
    return (step == 0) | (False if self.reset_after is None else step == self.reset_after)

  def renew(
      self, key: PRNGKey, params: PyTree, step: Array, generator: nn.Module,
      latent_shape: tuple[int, ...],
  ) -> PyTree:
    """Draws the generator, or its `first_layers`, anew if call `step` begins with that."""
    if self.meta == 'reinit':
      def draw(params):
        if self.redraw_std:
          return generators.redraw(key, params, self.redraw_std)
        return generators.init(generator, key, latent_shape)['params']
      return lax.cond(self.is_new(step), draw, lambda params: params, params)
    if self.reset_after is None:
      return params
    reset = lambda params: generators.redraw(key, params, layers=generator.first_layers)
    return lax.cond(step == self.reset_after, reset, lambda params: params, params)

  def gradient(self, params: PyTree, minimum: Minimum) -> PyTree:
    """Returns the meta-gradient of one inversion that started at `params`."""
    if self.meta == 'fomaml':  # First order: the gradients summed over the inner steps.
      return minimum.grads['params']
    scale = self.reptile_scale if self.meta == 'reptile' else 1.0
    return jax.tree.map(
        lambda start, end: scale * (start - end), params, minimum.variables['params'])

  def update(
      self, tx: optax.GradientTransformation, grads: PyTree, opt_state: PyTree, params: PyTree
  ) -> tuple[PyTree, PyTree]:
    """Moves the generator, from where the inversions started, by the averaged meta-gradient."""
    if self.meta in ('sequential', 'reinit'):
      return jax.tree.map(jnp.subtract, params, grads), opt_state
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
