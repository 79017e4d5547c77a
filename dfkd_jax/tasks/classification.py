"""Classification: one class an image."""

import functools

import jax
import jax.numpy as jnp

from dfkd_jax.losses import divergence
from dfkd_jax.tasks.task import Task, argmax, count_of
from dfkd_jax.types import Array, Metrics, PRNGKey


def classification(
    num_classes: int, *, balanced: bool = False, stratified: bool = False, ignore: int = -1
) -> Task:
  """One class an image.

  Args:
    num_classes: K.
    balanced: Draw labels by `shortfall` of the buffer's histogram.
    stratified: Ask for each class equally often, up to one.
      With neither, labels are uniform and independent, as published.
    ignore: Label of the examples that pad a batch; metrics pass over them.

  Raises:
    ValueError: If both `balanced` and `stratified` are set.
  """
  if balanced and stratified:
    raise ValueError('labels are either balanced or stratified, not both')

  def sample_labels(key: PRNGKey, batch_size: int, histogram: Array | None = None) -> Array:
    if stratified:
      return _stratified(key, batch_size, num_classes)
    if balanced and histogram is not None:
      log_odds = jnp.log(shortfall(histogram))
      return jax.random.categorical(key, log_odds, shape=(batch_size,)).astype(jnp.int32)
    return jax.random.randint(key, (batch_size,), 0, num_classes, jnp.int32)

  def labels_from(logits: Array, asked: Array | None = None) -> Array:
    return argmax(logits) if asked is None else asked

  return Task(
      num_classes, sample_labels, labels_from, predicted=argmax,
      metrics=functools.partial(_hits, ignore=ignore), summarize=_summarize_hits)


def shortfall(histogram: Array) -> Array:
  """Odds, not normalised, by which to ask for classes: max(h) - h + mean(h).

  What a class lacks to draw level with the commonest one, plus the mean, so that
  no class is ever passed over, the odds do not change if all counts double, and
  the rarest is asked for at most 1 + max(h) / mean(h) times as often as the
  commonest. Uniform where counts are equal, also where all are 0.

  Args:
    histogram: [K] counts.

  Returns:
    [K] float32, above 0.
  """
  counts = histogram.astype(jnp.float32)
  odds = counts.max() - counts + counts.mean()
  return jnp.where(counts.max() > 0, odds, 1.0)


def _stratified(key: PRNGKey, batch_size: int, num_classes: int) -> Array:
  """Each class floor(B/K) times, a random choice of them once more, in random order."""
  class_key, order_key = jax.random.split(key)
  classes = jax.random.permutation(class_key, num_classes)
  labels = jnp.resize(classes, batch_size)
  return jax.random.permutation(order_key, labels).astype(jnp.int32)


def _hits(logits: Array, labels: Array, ignore: int) -> Metrics:
  """Counts of right answers, and the summed cross-entropy."""
  known = labels != ignore
  # By rank in a sorted order: counting the larger ones would praise constant or NaN logits.
  _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
  right = (best == labels[:, None]) & known[:, None]
  return {
      'top1': right[:, 0].sum(),
      'top5': right.any(axis=1).sum(),
      'cross_entropy': divergence.cross_entropy(logits, labels, ignore).sum(),
      'count': known.sum(),
  }


def _summarize_hits(sums: Metrics) -> dict[str, float]:
  count = count_of(sums)
  return {name: float(sums[name]) / count for name in ('top1', 'top5', 'cross_entropy')}
