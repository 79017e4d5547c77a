"""Modulation of the one_hot term in SSD-KD: rare classes and hard images count more.

Liu et al., CVPR 2024 (arXiv:2406.07876), from a recollection of its equations; see
methods/ssd_kd.py.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dfkd_jax.losses import curriculum
from dfkd_jax.messages import FieldError
from dfkd_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Modulation:
  """Multiplier phi of each image's (or pixel's) one_hot term.

  The diversity is 1 - h[c] / |B|, with h the buffer's histogram and c the counted class. The
  difficulty is (1 - p)^gamma, with p the probability of the target.
  """

  diversity: bool = True  # whether phi has the factor diversity
  difficulty: bool = True  # whether phi has the factor difficulty
  gamma: float = 2.0  # unknown from the paper; 2 is the focal loss's

  def __post_init__(self):
    if not self.gamma >= 0:
      raise FieldError('gamma', f'gamma is {self.gamma}, must be at least 0.')

  @property
  def is_used(self) -> bool:
    """Whether there is a factor at all."""
    return self.diversity or self.difficulty

  def phi(
      self, logits: Array, targets: Array, histogram: Array, *, counts_targets: bool = False,
      is_normalised: bool = False, is_constant: bool = False) -> Array | None:
    """Returns phi [...], without a gradient if it `is_constant`; None if there is no factor.

    Args:
      logits: [..., K], the teacher's.
      targets: [...] int32, of the one_hot term.
      histogram: [K], images in the buffer by class.
      counts_targets: Whether the diversity counts the target, or the class that the teacher sees.
      is_normalised: Whether to take our variant of `losses.curriculum.diversity`.
    """
    if not self.is_used:
      return None
    phi = jnp.ones_like(logits[..., 0])
    if self.diversity:
      classes = targets if counts_targets else jnp.argmax(logits, -1)
      phi *= curriculum.diversity(classes, histogram, normalised=is_normalised)
    if self.difficulty:
      phi *= curriculum.difficulty(logits, targets, self.gamma)
    return jax.lax.stop_gradient(phi) if is_constant else phi
