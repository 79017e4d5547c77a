"""Divergences between the logits of two networks, per example or per pixel."""

import jax
import jax.numpy as jnp
import optax

from dfkd_jax.types import Array


def kl(student_logits: Array, teacher_logits: Array, temperature: float | Array = 1.0) -> Array:
  """T^2 KL(softmax(t / T) || softmax(s / T)), the loss of knowledge distillation.

  Hinton et al. (arXiv:1503.02531). Logits [..., K] give [...], for T above 0. Not negative; 0 where
  the logits differ by a constant only. The gradient flows to both, and T^2 keeps its size as T
  grows. The loss then tends to |s - t - mean(s - t)|^2 / 2K.
  """
  log_q = jax.nn.log_softmax(student_logits / temperature)
  log_p = jax.nn.log_softmax(teacher_logits / temperature)
  return temperature**2 * optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def js(a: Array, b: Array, temperature: float | Array = 1.0) -> Array:
  """Jensen-Shannon divergence as in DeepInversion's code (arXiv:1912.08795): [..., K] -> [...].

  The code differs from the textbook, and is followed here. It measures M || P and M || Q, clamps
  all three to [0.01, 0.99] without normalizing them again, and has no factor T^2. The clamp hides
  most classes if there are more than about 100. Symmetric in `a` and `b`, 0 where they agree. The
  clamp lets it fall slightly below 0. T is above 0.
  """
  p, q = jax.nn.softmax(a / temperature), jax.nn.softmax(b / temperature)
  m, p, q = (jnp.clip(probabilities, 0.01, 0.99) for probabilities in ((p + q) / 2, p, q))
  return jnp.sum(m * (jnp.log(m) - (jnp.log(p) + jnp.log(q)) / 2), axis=-1)


def l1(student: Array, teacher: Array) -> Array:
  """Mean over classes of |s - t|: [..., K] -> [...]. DFAD (arXiv:1912.11006)."""
  return jnp.mean(jnp.abs(student - teacher), axis=-1)


def l2(student: Array, teacher: Array) -> Array:
  """Mean over classes of (s - t)^2: [..., K] -> [...]."""
  return jnp.mean(jnp.square(student - teacher), axis=-1)


def cross_entropy(logits: Array, labels: Array, ignore: int | None = None) -> Array:
  """-log softmax(logits)[label]: [..., K], [...] integers in 0..K-1 -> [...].

  The loss is NaN at a label that is out of range, and 0 at the label `ignore` of unlabelled
  elements, such as 255.
  """
  labels = labels.astype(jnp.int32)
  # A negative index would count from the end; an index of K gives NaN.
  index = jnp.where(labels < 0, logits.shape[-1], labels)[..., None]
  log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), index, axis=-1, mode='fill')
  losses = -log_p.squeeze(-1)
  return losses if ignore is None else jnp.where(labels == ignore, 0, losses)


def agreement(a: Array, b: Array) -> Array:
  """Whether two networks choose the same class: logits [..., K], twice -> [...] bool."""
  return jnp.argmax(a, axis=-1) == jnp.argmax(b, axis=-1)
