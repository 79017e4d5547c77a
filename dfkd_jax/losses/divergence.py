"""Distances between two networks: of logits, per example or pixel, and of attention maps."""

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


def attention_map(maps: Array) -> Array:
  """Mean square over channels, normalized over pixels: [B, h, w, C] -> [B, h w]."""
  energy = jnp.square(maps).mean(-1).reshape(maps.shape[0], -1)
  return energy / optax.safe_norm(energy, 1e-12, axis=-1, keepdims=True)


def attention_transfer(student_maps: tuple[Array, ...], teacher_maps: tuple[Array, ...]) -> Array:
  """Distance between the attention maps of two networks, summed over stages: [B].

  sum_l |a_l(teacher) - a_l(student)| with a_l of `attention_map`, from 0 to 2 for each stage:
  Zagoruyko and Komodakis (arXiv:1612.03928). ZSKT (arXiv:1905.09768, equation 2; recalled) adds
  it to the divergence, with a factor of 250.

  Both have maps [B, h, w, C] after each stage. Channels may differ. Raises a ValueError if pixels
  or the number of stages differ, or there are none.
  """
  student, teacher = ([stage.shape[1:3] for stage in maps] for maps in (student_maps, teacher_maps))
  if student != teacher or not student:
    raise ValueError(
        f'Stages of the student have {student} pixels, must be {teacher}, as in the teacher.')
  return sum(optax.safe_norm(attention_map(a) - attention_map(b), 0.0, axis=-1)
             for a, b in zip(student_maps, teacher_maps, strict=True))
