"""What images are for: one class an image, or one a pixel.

The library asks a task for whatever depends on that, and else does not know which
it serves; losses take either without change, since they keep leading axes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.losses import divergence
from dfkd_jax.types import Array, Metrics, PRNGKey


class Task(NamedTuple):
  """Logits are [B, K] in classification, [B, H, W, K] in segmentation; labels lack the K."""

  num_classes: int
  sample_labels: Callable[..., Array]  # (key, batch_size, histogram [K] | None) -> [B] int32, classes to ask for
  labels_from: Callable[..., Array]  # (logits, asked [B] | None) -> int32 targets of the one_hot term
  predicted: Callable[[Array], Array]  # (logits) -> [B] int32, one class an image, for the replay buffer
  metrics: Callable[[Array, Array], Metrics]  # (logits, labels) -> sums over this batch; add them up
  summarize: Callable[[Metrics], dict[str, float]]  # (sums) -> what to report; higher is better, but for the loss
  asks: bool = True  # whether there is a class to ask an image for; else `sample_labels` is passed over

  def reduce(self, per_element: Array) -> Array:
    """Mean over all but the batch: [B, ...] -> [B]."""
    return per_element.reshape(per_element.shape[0], -1).mean(axis=1)


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
    return _argmax(logits) if asked is None else asked

  return Task(
      num_classes, sample_labels, labels_from, predicted=_argmax,
      metrics=functools.partial(_hits, ignore=ignore), summarize=_summarize_hits)


def segmentation(num_classes: int, ignore: int = 255) -> Task:
  """One class a pixel.

  Nobody can ask for a map of classes without real ones at hand, so the targets
  are the teacher's own answer at each pixel: `sample_labels` returns zeros, and
  `labels_from` passes over them.

  Args:
    num_classes: K.
    ignore: Label of pixels that are not labelled; metrics pass over them.
  """

  def sample_labels(key: PRNGKey, batch_size: int, histogram: Array | None = None) -> Array:
    del key, histogram
    return jnp.zeros(batch_size, jnp.int32)

  def labels_from(logits: Array, asked: Array | None = None) -> Array:
    del asked
    return _argmax(logits)

  def predicted(logits: Array) -> Array:
    pixels = jax.nn.one_hot(_argmax(logits), num_classes, dtype=jnp.int32)
    return _argmax(pixels.sum(axis=tuple(range(1, pixels.ndim - 1))))

  return Task(
      num_classes, sample_labels, labels_from, predicted,
      metrics=functools.partial(_confusion, num_classes=num_classes, ignore=ignore),
      summarize=_summarize_confusion, asks=False)


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


def _argmax(scores: Array) -> Array:
  return jnp.argmax(scores, axis=-1).astype(jnp.int32)


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
  count = _count(sums)
  return {name: float(sums[name]) / count for name in ('top1', 'top5', 'cross_entropy')}


def _confusion(logits: Array, labels: Array, num_classes: int, ignore: int) -> Metrics:
  """Counts of pixels by true class (rows) and answer (columns), and the summed cross-entropy."""
  labels = labels.astype(jnp.int32)
  known = labels != ignore
  cells = jnp.where(known, labels * num_classes + _argmax(logits), num_classes**2)
  counts = jnp.zeros(num_classes**2, jnp.int32).at[cells].add(1, mode='drop')
  return {
      'confusion': counts.reshape(num_classes, num_classes),
      'cross_entropy': divergence.cross_entropy(logits, labels, ignore).sum(),
      'count': known.sum(),
  }


def _summarize_confusion(sums: Metrics) -> dict[str, float]:
  """Mean over the classes that occur, in truth or answer, of intersection over union."""
  count = _count(sums)
  confusion = np.asarray(sums['confusion'], np.float64)
  both = np.diagonal(confusion)
  either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
  return {
      'mean_iou': float(np.mean(both[either > 0] / either[either > 0])),
      'pixel_accuracy': float(both.sum()) / count,
      'cross_entropy': float(sums['cross_entropy']) / count,
  }


def _count(sums: Metrics) -> int:
  count = int(sums['count'])
  if count == 0:
    raise ValueError('count is 0: there is no labelled example to report on')
  return count
