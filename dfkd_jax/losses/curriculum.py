"""Weights of samples by difficulty, for a student or for a generator."""

import jax
import jax.numpy as jnp

from dfkd_jax.messages import check_option
from dfkd_jax.types import Array

KINDS = ('log', 'soft', 'hard')


def self_paced_weights(losses: Array, threshold: float | Array, kind: str = 'log') -> Array:
  """Weights v of samples with loss l, for a threshold lambda of difficulty: [...] -> [...].

  CuDFKD (arXiv:2208.13648). The weights minimize v l + g(v; lambda) over v in [0, 1]:
    'hard': g = -lambda v; 1 where l < lambda, otherwise 0.
    'soft': g = lambda (v^2 / 2 - v); max(0, 1 - l / lambda).
    'log':  g = mu log mu + v log v - lambda v, mu = 1 + e^-lambda - v;
            (1 + e^-lambda) / (1 + e^(l - lambda)).
  Losses are not negative and lambda is above 0. The weights fall from 1 at no loss down to 0.
  Raises a ValueError if `kind` is unknown.
  """
  check_option('kind', kind, KINDS)
  if kind == 'hard':
    return (losses < threshold).astype(losses.dtype)
  if kind == 'soft':
    return jnp.maximum(0, 1 - losses / threshold)
  return (1 + jnp.exp(-threshold)) * jax.nn.sigmoid(threshold - losses)


def diversity(classes: Array, histogram: Array, *, normalised: bool = False) -> Array:
  """Diversity 1 - h[c] / |B|, which falls with the number of images of this class.

  The first factor of SSD-KD's modulation (arXiv:2406.07876, section 3; recalled, since neither
  the full text nor code was at hand). Each of K balanced classes has 1 - 1/K, so the factor
  hardly separates many classes. `normalised` is our variant for these, min(1, |B| / (K h[c])).

  Classes [...] int32 and the histogram [K], counts over the live buffer, give [...] in [0, 1]; 1
  while the buffer is empty.
  """
  counts = histogram.astype(jnp.result_type(float))
  size = counts.sum()
  if normalised:
    shares = jnp.minimum(1, size / jnp.maximum(counts.size * counts[classes], 1))
    return shares * (size > 0) + (size == 0)
  return 1 - counts[classes] / jnp.maximum(size, 1)


def difficulty(logits: Array, classes: Array, gamma: float) -> Array:
  """Difficulty (1 - p)^gamma in [0, 1], with p the teacher's probability of the class.

  The second factor of SSD-KD's modulation (arXiv:2406.07876, section 3; recalled), as in the
  focal loss (arXiv:1708.02002, equation 4). Logits [..., K] and classes [...] int32 give [...].
  `gamma` is at least 0; 0 gives 1 throughout.
  """
  log_p = jax.nn.log_softmax(logits)
  is_class = classes[..., None] == jnp.arange(logits.shape[-1])
  # 1 - p as a sum over the other classes: exact where p rounds to 1, with bounded gradients.
  return jnp.exp(gamma * jax.nn.logsumexp(jnp.where(is_class, -jnp.inf, log_p), axis=-1))
