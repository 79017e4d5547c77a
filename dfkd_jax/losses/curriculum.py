"""How much each sample counts, by how hard it is: what a student can learn now, what a generator lacks."""

import jax
import jax.numpy as jnp

from dfkd_jax.types import Array

KINDS = ('log', 'soft', 'hard')


def self_paced_weights(losses: Array, threshold: float | Array, kind: str = 'log') -> Array:
  """Weights v of samples by their loss l at a threshold of difficulty lambda.

  CuDFKD (arXiv:2208.13648); the minimisers of v l + g(v; lambda) over v in [0, 1]:
    'hard': g = -lambda v; 1 where l < lambda, else 0.
    'soft': g = lambda (v^2 / 2 - v); max(0, 1 - l / lambda).
    'log':  g = mu log mu + v log v - lambda v, mu = 1 + e^-lambda - v;
            (1 + e^-lambda) / (1 + e^(l - lambda)).

  Args:
    losses: [...], not negative.
    threshold: lambda, above 0.
    kind: One of the three.

  Returns:
    [...], from 1 at no loss down to 0.

  Raises:
    ValueError: On another kind.
  """
  if kind == 'hard':
    return (losses < threshold).astype(losses.dtype)
  if kind == 'soft':
    return jnp.maximum(0, 1 - losses / threshold)
  if kind == 'log':
    return (1 + jnp.exp(-threshold)) * jax.nn.sigmoid(threshold - losses)
  raise ValueError(f'kind is {kind!r}, must be one of {KINDS}.')


def robust_loss(losses: Array, threshold: float | Array, kind: str = 'log') -> Array:
  """F(l; lambda), the integral of `self_paced_weights` from 0 to l: what their student minimises in effect.

  F is concave in l, so that its tangent lies above it: a step that lowers the weighted loss lowers F.

  Args:
    losses: [...], not negative.
    threshold: lambda, above 0.
    kind: As for `self_paced_weights`.

  Returns:
    [...], from 0 to a bound that grows with lambda.
  """
  if kind == 'hard':
    return jnp.minimum(losses, threshold)
  if kind == 'soft':
    within = jnp.minimum(losses, threshold)
    return within - within**2 / (2 * threshold)
  if kind == 'log':
    within = jnp.minimum(losses, threshold + 50)  # Beyond, F is at its bound, and the difference below is all rounding.
    rise = jax.nn.softplus(within - threshold) - jax.nn.softplus(-threshold)
    return (1 + jnp.exp(-threshold)) * (within - rise)
  raise ValueError(f'kind is {kind!r}, must be one of {KINDS}.')


def diversity(classes: Array, histogram: Array, *, normalised: bool = False) -> Array:
  """1 - h[c] / |B|: the less, the more images of this class there are already.

  The first factor of SSD-KD's modulation (arXiv:2406.07876, section 3; recalled, since neither the full text nor
  code was at hand). Of K classes that are balanced each has 1 - 1/K, so that it hardly tells classes apart where K
  is large; `normalised` is our variant for that, min(1, |B| / (K h[c])).

  Args:
    classes: [...] int32.
    histogram: [K] counts over the live buffer.
    normalised: Whether to take our variant.

  Returns:
    [...] in [0, 1]; 1 while the buffer is empty.
  """
  counts = histogram.astype(jnp.result_type(float))
  size = counts.sum()
  if normalised:
    return jnp.minimum(1, size / jnp.maximum(counts.size * counts[classes], 1)) * (size > 0) + (size == 0)
  return 1 - counts[classes] / jnp.maximum(size, 1)


def difficulty(logits: Array, classes: Array, gamma: float) -> Array:
  """(1 - p)^gamma with p the probability of the class: the less, the surer the teacher is.

  The second factor of SSD-KD's modulation (arXiv:2406.07876, section 3; recalled), that of the focal loss
  (arXiv:1708.02002, equation 4).

  Args:
    logits: [..., K], the teacher's.
    classes: [...] int32.
    gamma: At least 0; 0 gives 1 throughout.

  Returns:
    [...] in [0, 1].
  """
  log_p = jax.nn.log_softmax(logits)
  target = classes[..., None] == jnp.arange(logits.shape[-1])
  # 1 - p as the sum of the others: exact where p rounds to 1, and its logarithm has a bounded gradient.
  return jnp.exp(gamma * jax.nn.logsumexp(jnp.where(target, -jnp.inf, log_p), axis=-1))
