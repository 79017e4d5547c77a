"""Classification: one class per image."""

import jax
import jax.numpy as jnp

from dfkd_jax.losses import divergence
from dfkd_jax.tasks.task import Task, argmax, count_of
from dfkd_jax.types import Array


def classification(num_classes: int, *, balanced: bool = False, stratified: bool = False,
                   ignore: int = -1) -> Task:
  """Makes the task of one class per image.

  Without `balanced` and `stratified`, labels are uniform and independent, as published. Raises a
  ValueError if both are set.

  Args:
    balanced: Whether to draw labels by `shortfall` of the buffer's histogram.
    stratified: Whether to request each class equally often, up to one.
    ignore: Label of the examples that pad a batch; metrics skip them.
  """
  if balanced and stratified:
    raise ValueError('labels are either balanced or stratified, not both')

  def sample_labels(key, batch_size, histogram=None):
    if stratified:  # A random subset of classes once more than the others, in random order.
      class_key, order_key = jax.random.split(key)
      labels = jnp.resize(jax.random.permutation(class_key, num_classes), batch_size)
      return jax.random.permutation(order_key, labels).astype(jnp.int32)
    if balanced and histogram is not None:
      log_odds = jnp.log(shortfall(histogram))
      return jax.random.categorical(key, log_odds, shape=(batch_size,)).astype(jnp.int32)
    return jax.random.randint(key, (batch_size,), 0, num_classes, jnp.int32)

  def labels_from(logits, requested=None):
    return argmax(logits) if requested is None else requested

  def metrics(logits, labels):
    is_known = labels != ignore
    # By rank in a sorted order: counting larger logits would reward constant or NaN logits.
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = (best == labels[:, None]) & is_known[:, None]
    return {'top1': hits[:, 0].sum(), 'top5': hits.any(axis=1).sum(), 'count': is_known.sum(),
            'cross_entropy': divergence.cross_entropy(logits, labels, ignore).sum()}

  def summarize(sums):
    count = count_of(sums)
    return {name: float(sums[name]) / count for name in ('top1', 'top5', 'cross_entropy')}

  return Task(num_classes, sample_labels, labels_from, argmax, metrics, summarize)


def shortfall(histogram: Array) -> Array:
  """Unnormalized odds by which to request classes, [K] counts -> [K] float32 above 0.

  max(h) - h + mean(h): the number of images that a class lacks to the most common one, plus the
  mean. No class is ever left out. The odds keep their ratios if all counts double. The rarest class
  is requested at most 1 + max(h) / mean(h) times as often as the most common. The odds are uniform
  where counts are equal, also where all are 0.
  """
  counts = histogram.astype(jnp.float32)
  odds = counts.max() - counts + counts.mean()
  return jnp.where(counts.max() > 0, odds, 1.0)
