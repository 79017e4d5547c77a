"""Classification: one class per image."""

import functools

import jax
import jax.numpy as jnp

from dfkd_jax.losses import divergence
from dfkd_jax.tasks.task import Task, argmax, count_of
from dfkd_jax.types import Array, Metrics, PRNGKey


def classification(
    num_classes: int, *, balanced: bool = False, stratified: bool = False, ignore: int = -1
) -> Task:
  """Makes the task of one class per image.

  Without `balanced` and `stratified`, labels are uniform and independent, as published.

  Args:
    num_classes: K.
    balanced: Whether to draw labels by `shortfall` of the buffer's histogram.
    stratified: Whether to request each class equally often, up to one.
    ignore: Label of the examples that pad a batch; metrics skip them.

  Raises:
    ValueError: Both `balanced` and `stratified` are set.
  """
  if balanced and stratified:
    raise ValueError('labels are either balanced or stratified, not both')

  def sample_labels(key: PRNGKey, batch_size: int, histogram: Array | None = None) -> Array:
    if stratified:
      return _stratified_labels(key, batch_size, num_classes)
    if balanced and histogram is not None:
      log_odds = jnp.log(shortfall(histogram))
      return jax.random.categorical(key, log_odds, shape=(batch_size,)).astype(jnp.int32)
    return jax.random.randint(key, (batch_size,), 0, num_classes, jnp.int32)

  def labels_from(logits: Array, requested: Array | None = None) -> Array:
    return argmax(logits) if requested is None else requested

  return Task(
      num_classes, sample_labels, labels_from, predicted=argmax,
      metrics=functools.partial(_count_hits, ignore=ignore), summarize=_summarize_hits)


def shortfall(histogram: Array) -> Array:
  """Unnormalized odds by which to request classes: max(h) - h + mean(h).

  This is the number of images that a class lacks to the most common one, plus the mean. No class
  is ever left out. The odds keep their ratios if all counts double. The rarest class is requested
  at most 1 + max(h) / mean(h) times as often as the most common. The odds are uniform where
  counts are equal, also where all are 0.

  Args:
    histogram: [K] counts.

  Returns:
    [K] float32, above 0.
  """
  counts = histogram.astype(jnp.float32)
  odds = counts.max() - counts + counts.mean()
  return jnp.where(counts.max() > 0, odds, 1.0)


def _stratified_labels(key: PRNGKey, batch_size: int, num_classes: int) -> Array:
  """Each class floor(B/K) times, a random subset of classes once more, in random order."""
  class_key, order_key = jax.random.split(key)
  classes = jax.random.permutation(class_key, num_classes)
  labels = jnp.resize(classes, batch_size)
  return jax.random.permutation(order_key, labels).astype(jnp.int32)


def _count_hits(logits: Array, labels: Array, ignore: int) -> Metrics:
  """Counts of correct predictions, and the summed cross-entropy."""
  is_known = labels != ignore
  # By rank in a sorted order: counting larger logits would reward constant or NaN logits.
  _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
  hits = (best == labels[:, None]) & is_known[:, None]
  return {
      'top1': hits[:, 0].sum(),
      'top5': hits.any(axis=1).sum(),
      'cross_entropy': divergence.cross_entropy(logits, labels, ignore).sum(),
      'count': is_known.sum(),
  }


def _summarize_hits(sums: Metrics) -> dict[str, float]:
  count = count_of(sums)
  return {name: float(sums[name]) / count for name in ('top1', 'top5', 'cross_entropy')}
