"""Segmentation: one class per pixel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.losses import divergence
from dfkd_jax.tasks.task import Task, argmax, count_of
from dfkd_jax.types import Array, Metrics, PRNGKey


def segmentation(num_classes: int, ignore: int = 255) -> Task:
  """Makes the task of one class per pixel.

  A map of classes cannot be requested without real maps at hand. The targets are therefore the
  teacher's own predictions at each pixel: `sample_labels` returns zeros, and `labels_from`
  ignores them.

  Args:
    num_classes: K.
    ignore: Label of unlabelled pixels; metrics skip them.
  """

  def sample_labels(key: PRNGKey, batch_size: int, histogram: Array | None = None) -> Array:
    del key, histogram
    return jnp.zeros(batch_size, jnp.int32)

  def labels_from(logits: Array, requested: Array | None = None) -> Array:
    del requested
    return argmax(logits)

  def predicted(logits: Array) -> Array:
    pixels = jax.nn.one_hot(argmax(logits), num_classes, dtype=jnp.int32)
    return argmax(pixels.sum(axis=tuple(range(1, pixels.ndim - 1))))

  return Task(
      num_classes, sample_labels, labels_from, predicted,
      metrics=functools.partial(_count_pixels, num_classes=num_classes, ignore=ignore),
      summarize=_summarize_pixels, asks=False)


def _count_pixels(logits: Array, labels: Array, num_classes: int, ignore: int) -> Metrics:
  """Confusion matrix by true class (rows) and prediction (columns), and summed cross-entropy."""
  labels = labels.astype(jnp.int32)
  is_known = labels != ignore
  cells = jnp.where(is_known, labels * num_classes + argmax(logits), num_classes**2)
  counts = jnp.zeros(num_classes**2, jnp.int32).at[cells].add(1, mode='drop')
  return {
      'confusion': counts.reshape(num_classes, num_classes),
      'cross_entropy': divergence.cross_entropy(logits, labels, ignore).sum(),
      'count': is_known.sum(),
  }


def _summarize_pixels(sums: Metrics) -> dict[str, float]:
  """Mean intersection over union of the classes that occur, in truth or prediction."""
  count = count_of(sums)
  confusion = np.asarray(sums['confusion'], np.float64)
  both = np.diagonal(confusion)
  either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
  return {
      'mean_iou': float(np.mean(both[either > 0] / either[either > 0])),
      'pixel_accuracy': float(both.sum()) / count,
      'cross_entropy': float(sums['cross_entropy']) / count,
  }
