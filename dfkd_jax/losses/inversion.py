"""Terms that images are synthesized by, such as the teacher's moments and its disagreements."""

import functools

import jax
import jax.numpy as jnp
import optax

from dfkd_jax.losses import divergence as divergences
from dfkd_jax.messages import check_option
from dfkd_jax.types import Array, Moments


def one_hot(logits: Array, labels: Array) -> Array:
  """Cross-entropy of the teacher's logits and the requested class: [..., K], [...] -> [...]."""
  return divergences.cross_entropy(logits, labels)


def adversarial(student_logits: Array, teacher_logits: Array, *, masked: bool = True,
                divergence: str = 'kl', temperature: float | Array = 1.0) -> Array:
  """Minus the divergence of student and teacher: seeks images on which they differ.

  The mask of CMI (arXiv:2105.08584) counts only images on which both still choose the same class,
  so that no image is pushed far beyond the decision boundary. The mask is a constant. The
  gradient flows through both logits [..., K]. The result [...] is at most 0; 'js' exceeds 0 by its
  clamp only.

  Args:
    masked: Whether only agreement counts. The mean over a batch divides by the batch, not by the
      number of agreements.
    divergence: 'kl' (with its T^2), 'l1' (of logits; no temperature), 'js', or 'log_l1': every
      element is log(1 + mean of l1), as in DFAD's segmentation. Otherwise raises a ValueError.
    temperature: T, above 0.
  """
  measures = {'kl': functools.partial(divergences.kl, temperature=temperature),
              'l1': divergences.l1, 'log_l1': divergences.l1,
              'js': functools.partial(divergences.js, temperature=temperature)}
  check_option('divergence', divergence, tuple(measures))
  distance = measures[divergence](student_logits, teacher_logits)
  if masked:
    distance = jnp.where(divergences.agreement(student_logits, teacher_logits), distance, 0)
  if divergence == 'log_l1':
    distance = jnp.full_like(distance, jnp.log1p(distance.mean()))
  return -distance


def balance(logits: Array, temperature: float | Array = 1.0) -> Array:
  """Minus the entropy of the batch's mean prediction: spreads a batch over the classes.

  Averages logits [..., K] over all leading axes; the result [] is from -log K to 0. The temperature
  is above 0. DAFL (arXiv:1904.01186) has 1. CuDFKD (arXiv:2208.13648) has its distillation's.
  """
  log_p = jax.nn.log_softmax(logits.reshape(-1, logits.shape[-1]) / temperature)
  # In logarithms, since the gradient of p log p is infinite where p rounds to 0.
  log_mean = jax.nn.logsumexp(log_p, axis=0) - jnp.log(log_p.shape[0])
  return jnp.sum(jnp.exp(log_mean) * log_mean)


def activation(features: Array) -> Array:
  """-mean |f| of the teacher's pooled features: [B, ...] -> [B]. DAFL (arXiv:1904.01186)."""
  return -jnp.mean(jnp.abs(features), axis=tuple(range(1, features.ndim)))


def total_variation(images: Array) -> Array:
  """Mean absolute difference of neighbours: right, below and on both diagonals, summed.

  [B, H, W, C] -> [B], with H and W at least 2. DeepInversion's prior (arXiv:1912.08795) in its l1
  form. The mean over a batch is the published value.
  """
  differences = (images[:, :, 1:] - images[:, :, :-1], images[:, 1:] - images[:, :-1],
                 images[:, 1:, 1:] - images[:, :-1, :-1], images[:, 1:, :-1] - images[:, :-1, 1:])
  return sum(jnp.mean(jnp.abs(difference), axis=(1, 2, 3)) for difference in differences)


def l2(images: Array) -> Array:
  """Frobenius norm, not squared, with gradient 0 at 0: [B, H, W, C] -> []. arXiv:1912.08795."""
  return optax.safe_norm(images.ravel(), 0.0)


def contrast(local: Array, global_: Array, bank_local: Array, bank_global: Array,
             temperature: float | Array, valid: Array) -> Array:
  """Cross-entropy by which each image's local view finds its own global view among all images: [].

  Contrastive model inversion (CMI, arXiv:2105.08584). Row i of the similarities is the local view
  of image i, column j the global view of image j. The targets are on the diagonal, and the global
  views are constants. Rows of the current batch and of the bank are averaged separately, then
  added. The published code yields NaN whenever its bank is just full. Here only invalid slots are
  left out, and a bank without valid slots adds nothing. The loss is not negative.

  Args:
    local, global_: [B, d], projections of norm 1.
    bank_local, bank_global: [N, d], projections of earlier images; N may be 0.
    temperature: T, above 0.
    valid: [N] bool, whether each slot of the bank holds an image.
  """
  size = local.shape[0]
  rows = jnp.concatenate([local, bank_local])
  columns = jax.lax.stop_gradient(jnp.concatenate([global_, bank_global]))
  present = jnp.concatenate([jnp.ones(size, bool), valid.astype(bool)])
  # An infinite similarity on the diagonal of an empty slot would give NaN gradients.
  lowest = jnp.finfo(rows.dtype).min / 2
  similarities = jnp.where(present, rows @ columns.T / temperature, lowest)
  losses = jax.nn.logsumexp(similarities, axis=-1) - jnp.diagonal(similarities)
  bank_losses = jnp.where(present, losses, 0)[size:]
  return losses[:size].mean() + bank_losses.sum() / jnp.maximum(present[size:].sum(), 1)


def batch_norm(moments: dict[str, Moments], running: dict[str, Moments]) -> Array:
  """Distance of a batch's moments from the running moments of training, summed over layers: [].

  sum_l |var_l - running var_l| + |mean_l - running mean_l|, with norms over channels that are not
  squared (DeepInversion, arXiv:1912.08795, as in its code). Twice the deviation costs twice as
  much, and scaled deviations, as in `mix`, scale the gradient alike. The gradient is 0 where the
  moments are equal. Both arguments are by path of the layer. Raises a ValueError if the paths
  differ, or there are none.
  """
  return sum(batch_norm_by_layer(moments, running).values())


def batch_norm_by_layer(
    moments: dict[str, Moments], running: dict[str, Moments]) -> dict[str, Array]:
  """The summands of `batch_norm`, by path of the layer."""
  _check_paths(moments, running)
  distance = lambda a, b: (
      optax.safe_norm(a.var - b.var, 0.0) + optax.safe_norm(a.mean - b.mean, 0.0))
  return {path: distance(moments[path], running[path]) for path in sorted(moments)}


def relative_batch_norm(moments: dict[str, Moments], running: dict[str, Moments]) -> Array:
  """`batch_norm` in units of each layer's own scale, so that one factor suits any teacher: [].

  sum_l |var_l - running var_l| / |running var_l|
      + |mean_l - running mean_l| / sqrt(sum_c running var_lc).
  Scaling a layer's input, as another preprocessing or another width does, changes nothing. In
  contrast, `batch_norm` of published networks spans four orders of magnitude. This term is ours;
  the papers have none like it. Arguments and errors are as for `batch_norm`.
  """
  _check_paths(moments, running)
  distance = lambda a, b: optax.safe_norm(a - b, 0.0)
  scale = lambda square: jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))
  return sum(
      distance(moments[path].var, var) / scale(jnp.square(var).sum())
      + distance(moments[path].mean, mean) / scale(var.sum())
      for path, (mean, var) in sorted(running.items()))


def mix(batch: dict[str, Moments], past: dict[str, Moments],
        momentum: float | Array) -> dict[str, Moments]:
  """Running average of moments: (1 - momentum) * batch + momentum * past, by path of the layer.

  FastDFKD (arXiv:2112.06253) matches these to the teacher's, and keeps the same mixture as the
  next past. The gradient flows to `batch`; `past` is a constant. `momentum` is in [0, 1] and may be
  traced; 0 while there is no past. Raises a ValueError as `batch_norm`.
  """
  _check_paths(batch, past)
  past = jax.lax.stop_gradient(past)
  return jax.tree.map(lambda new, old: (1 - momentum) * new + momentum * old, batch, past)


def _check_paths(moments: dict[str, Moments], others: dict[str, Moments]) -> None:
  if not moments and not others:
    raise ValueError(
        'network without BatchNorm: batch_norm or student_batch_norm has nothing to match')
  differing = sorted(set(moments) ^ set(others))
  if differing:
    side = 'first' if differing[0] in moments else 'second'
    raise ValueError(f'batch norm {differing[0]!r} is among the {side} moments only '
                     f'({len(differing)} paths differ)')
