"""Prioritised replay: images are drawn in proportion to their loss when last seen.

Schaul et al., Prioritized Experience Replay, 2016 (arXiv:1511.05952).
"""

import dataclasses

import jax
import jax.numpy as jnp

from dfkd_jax.messages import FieldError, check_option
from dfkd_jax.synth import replay
from dfkd_jax.synth.replay import ReplayBuffer
from dfkd_jax.types import Array, Batch, PRNGKey


@dataclasses.dataclass(frozen=True)
class Priorities:
  """How the student's images are drawn and weighed."""

  draw: str = 'priority'  # by 'priority' or 'uniform' (then every sample weighs 1)
  beta: float = 0.5  # exponent of the importance weights
  epsilon: float = 1e-6  # added to every priority, so that no image is out of reach
  clip_weights: float | None = 10.0  # largest importance weight; None: no bound

  def __post_init__(self):
    check_option('draw', self.draw, ('priority', 'uniform'))
    for name, is_valid, allowed in (
        ('beta', 0 <= self.beta < 1, 'in [0, 1): at 1 and above the priorities never settle'),
        ('epsilon', self.epsilon > 0, 'above 0'),
        ('clip_weights', self.clip_weights is None or self.clip_weights > 0,
         'above 0, or None for no bound')):
      if not is_valid:
        raise FieldError(name, f'{name} is {getattr(self, name)}, must be {allowed}.')

  @property
  def is_used(self) -> bool:
    """Whether images are drawn by priority."""
    return self.draw == 'priority'

  def sample(
      self, key: PRNGKey, buffer: ReplayBuffer, batch_size: int, axis: str | None = None) -> Batch:
    """Draws images for the student, by priority or uniformly."""
    if self.is_used:
      return sample_by_priority(key, buffer, batch_size, self.epsilon, axis)
    return replay.sample(key, buffer, batch_size, axis)


def live_priorities(buffer: ReplayBuffer) -> Array:
  """Returns priorities [M, N], none negative, and 0 in empty slots.

  A stored value of -r stands for r times the stripe's highest priority, or for r while there is
  none. So images that were never drawn are on the scale of the others.
  """
  is_live = jnp.arange(buffer.capacity) < buffer.size
  stored = jnp.where(is_live, buffer.priorities, 0.0)
  highest = stored.max(1, keepdims=True)
  return jnp.where(stored < 0, -stored * jnp.where(highest > 0, highest, 1.0), stored)


def probabilities(buffer: ReplayBuffer, epsilon: float = 1e-6) -> Array:
  """Returns P ∝ priority + epsilon (equation 1, alpha 1) in each stripe [M, N]; 0 if empty."""
  is_live = jnp.arange(buffer.capacity) < buffer.size
  odds = jnp.where(is_live, live_priorities(buffer) + epsilon, 0.0)
  return odds / jnp.maximum(odds.sum(1, keepdims=True), jnp.finfo(odds.dtype).tiny)


def sample_by_priority(
    key: PRNGKey, buffer: ReplayBuffer, batch_size: int, epsilon: float = 1e-6,
    axis: str | None = None) -> Batch:
  """Draws images by `probabilities`, with replacement, equally many from each stripe.

  A probability below 2^-31 is rounded up to it, so that each live slot is within reach and no
  other is. See `replay.sample_slots` for the arguments.
  """

  def draw_slots(keys, share):
    # In integers, whose sums are exact: float32 would lose the rare beside 1.
    odds = jnp.ceil(2.0**31 * probabilities(buffer, epsilon)).astype(jnp.uint32)
    upper = jnp.cumsum(odds, axis=1, dtype=jnp.uint32)
    draw = lambda k, u: jax.random.randint(k, (share,), 0, u[-1], jnp.uint32)
    draws = jax.vmap(draw)(keys, upper)
    slots = jax.vmap(lambda u, d: jnp.searchsorted(u, d, side='right'))(upper, draws)
    return jnp.minimum(slots, buffer.capacity - 1).astype(jnp.int32)  # An empty buffer: any slot.

  return replay.sample_slots(key, buffer, batch_size, axis, draw_slots)


def set_priorities(buffer: ReplayBuffer, slots: Array, priorities: Array) -> ReplayBuffer:
  """Writes priorities [B] at slots [B], as `Batch.slots` numbers them.

  Of several at one slot the highest stays. Negative values become 0. A slot of -1 is skipped.
  """
  flat, slots = _flatten(buffer.priorities, slots)
  # Independent of the order in which a device writes duplicates.
  flat = flat.at[slots].set(0.0, mode='drop').at[slots].max(
      priorities.astype(flat.dtype), mode='drop')
  return buffer.replace(priorities=flat.reshape(buffer.priorities.shape))


def weights_at(buffer: ReplayBuffer, slots: Array) -> Array:
  """Returns the importance weights [B] that were last set at slots [B]; 1 for a slot of -1."""
  return jnp.where(slots < 0, 1.0, buffer.weights.reshape(-1)[slots])


def set_weights(buffer: ReplayBuffer, slots: Array, weights: Array) -> ReplayBuffer:
  """Writes importance weights [B] at slots [B], equal where slots are; skips slots of -1."""
  flat, slots = _flatten(buffer.weights, slots)
  flat = flat.at[slots].set(weights.astype(flat.dtype), mode='drop')
  return buffer.replace(weights=flat.reshape(buffer.weights.shape))


def importance_weights(
    buffer: ReplayBuffer, slots: Array, beta: float | Array, epsilon: float = 1e-6) -> Array:
  """Returns (N P)^-beta [B] at slots [B], N images a stripe, not normalised (section 3.4)."""
  chances = probabilities(buffer, epsilon).reshape(-1)[slots]
  # A slot that was drawn is live, and its chance above 0; the guard is for an empty buffer.
  return jnp.maximum(buffer.size * chances, jnp.finfo(chances.dtype).tiny) ** -beta


def _flatten(values: Array, slots: Array) -> tuple[Array, Array]:
  """Flattens [M, N] values, and moves slots of -1, the last one to JAX, beyond the last."""
  return values.reshape(-1), jnp.where(slots < 0, values.size, slots)
