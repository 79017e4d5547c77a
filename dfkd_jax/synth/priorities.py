"""Prioritised replay: images are drawn in proportion to their loss when last seen.

References:
  Schaul et al., Prioritized Experience Replay, 2016, https://arxiv.org/abs/1511.05952.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dfkd_jax.messages import FieldError, check_option
from dfkd_jax.synth import replay
from dfkd_jax.synth.replay import ReplayBuffer
from dfkd_jax.types import Array, Batch, PRNGKey

DRAWS = ('priority', 'uniform')


@dataclasses.dataclass(frozen=True)
class Priorities:
  """How the student's images are drawn and weighed.

  Attributes:
    draw: By 'priority' or 'uniform' (then every sample weighs 1).
    beta: Exponent of the importance weights.
    epsilon: Added to every priority, so that no image is out of reach.
    clip_weights: Largest importance weight; None: no bound.
  """

  draw: str = 'priority'
  beta: float = 0.5
  epsilon: float = 1e-6
  clip_weights: float | None = 10.0

  def __post_init__(self):
    check_option('draw', self.draw, DRAWS)
    if not 0 <= self.beta < 1:
      raise FieldError('beta', f'beta is {self.beta}, must be in [0, 1): at 1 and above the '
                       'priorities never settle.')
    if self.epsilon <= 0:
      raise FieldError('epsilon', f'epsilon is {self.epsilon}, must be above 0.')
    if self.clip_weights is not None and self.clip_weights <= 0:
      raise FieldError('clip_weights', f'clip_weights is {self.clip_weights}, must be above 0, '
                       'or None for no bound.')

  @property
  def is_used(self) -> bool:
    """Whether images are drawn by priority."""
    return self.draw == 'priority'

  def sample(
      self, key: PRNGKey, buffer: ReplayBuffer, batch_size: int, axis: str | None = None
  ) -> Batch:
    """Draws images for the student, by priority or uniformly."""
    if self.is_used:
      return sample_by_priority(key, buffer, batch_size, self.epsilon, axis)
    return replay.sample(key, buffer, batch_size, axis)


def live_priorities(buffer: ReplayBuffer) -> Array:
  """Returns priorities [M, N], none negative, and 0 in empty slots.

  A stored value of -r stands for r times the stripe's highest priority, or for r while there is
  none. So images that have not been drawn yet are on the scale of the others, however large the
  first losses are.
  """
  is_live = jnp.arange(buffer.capacity) < buffer.size
  stored = jnp.where(is_live, buffer.priorities, 0.0)
  highest = stored.max(1, keepdims=True)
  return jnp.where(stored < 0, -stored * jnp.where(highest > 0, highest, 1.0), stored)


def probabilities(buffer: ReplayBuffer, epsilon: float = 1e-6) -> Array:
  """Returns P ∝ priority + epsilon within each stripe, [M, N], and 0 in empty slots.

  arXiv:1511.05952, equation 1 with alpha 1.
  """
  is_live = jnp.arange(buffer.capacity) < buffer.size
  odds = jnp.where(is_live, live_priorities(buffer) + epsilon, 0.0)
  return odds / jnp.maximum(odds.sum(1, keepdims=True), jnp.finfo(odds.dtype).tiny)


def sample_by_priority(
    key: PRNGKey, buffer: ReplayBuffer, batch_size: int, epsilon: float = 1e-6,
    axis: str | None = None,
) -> Batch:
  """Draws images by `probabilities`, with replacement, equally many from each stripe.

  A probability below 2^-31 is rounded up to it, so that each live slot is within reach and no
  other is. See `replay.sample` for the arguments.
  """

  def draw_slots(keys, share):
    # In integers, whose sums are exact: float32 would lose the rare beside 1.
    odds = jnp.ceil(2.0**31 * probabilities(buffer, epsilon)).astype(jnp.uint32)
    upper = jnp.cumsum(odds, axis=1, dtype=jnp.uint32)
    draws = jax.vmap(lambda k, u: jax.random.randint(k, (share,), 0, u[-1], jnp.uint32))(
        keys, upper)
    slots = jax.vmap(lambda u, d: jnp.searchsorted(u, d, side='right'))(upper, draws)
    return jnp.minimum(slots, buffer.capacity - 1).astype(jnp.int32)  # An empty buffer: any slot.

  return replay.sample_slots(key, buffer, batch_size, axis, draw_slots)


def set_priorities(buffer: ReplayBuffer, slots: Array, priorities: Array) -> ReplayBuffer:
  """Writes priorities [B] at slots [B], as `Batch.slots` numbers them.

  Of several at one slot the highest stays. Negative values become 0. A slot of -1 is skipped.
  """
  flat = buffer.priorities.reshape(-1)
  slots = _skip_unknown(slots, flat.size)
  # Independent of the order in which a device writes duplicates.
  flat = flat.at[slots].set(0.0, mode='drop').at[slots].max(
      priorities.astype(flat.dtype), mode='drop')
  return buffer.replace(priorities=flat.reshape(buffer.priorities.shape))


def weights_at(buffer: ReplayBuffer, slots: Array) -> Array:
  """Returns the importance weights [B] that were last set at slots [B]; 1 for a slot of -1."""
  return jnp.where(slots < 0, 1.0, buffer.weights.reshape(-1)[slots])


def set_weights(buffer: ReplayBuffer, slots: Array, weights: Array) -> ReplayBuffer:
  """Writes importance weights [B] at slots [B]; several at one slot must be equal.

  A slot of -1 is skipped.
  """
  flat = buffer.weights.reshape(-1)
  slots = _skip_unknown(slots, flat.size)
  flat = flat.at[slots].set(weights.astype(flat.dtype), mode='drop')
  return buffer.replace(weights=flat.reshape(buffer.weights.shape))


def importance_weights(
    buffer: ReplayBuffer, slots: Array, beta: float | Array, epsilon: float = 1e-6
) -> Array:
  """Returns (N P)^-beta [B] at slots [B], with N the images of a stripe.

  arXiv:1511.05952, section 3.4, not normalised.
  """
  chances = probabilities(buffer, epsilon).reshape(-1)[slots]
  # A slot that was drawn is live, and its chance above 0; the guard is for an empty buffer.
  return jnp.maximum(buffer.size * chances, jnp.finfo(chances.dtype).tiny) ** -beta


def _skip_unknown(slots: Array, size: int) -> Array:
  """Moves a slot of -1, the last one to JAX, beyond the last."""
  return jnp.where(slots < 0, size, slots)
