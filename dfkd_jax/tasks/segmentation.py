"""Segmentation: one class a pixel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.losses import divergence
from dfkd_jax.tasks.task import Task, argmax, count_of
from dfkd_jax.types import Array, Metrics, PRNGKey


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
    return argmax(logits)

  def predicted(logits: Array) -> Array:
    pixels = jax.nn.one_hot(argmax(logits), num_classes, dtype=jnp.int32)
    return argmax(pixels.sum(axis=tuple(range(1, pixels.ndim - 1))))

  return Task(
      num_classes, sample_labels, labels_from, predicted,
      metrics=functools.partial(_confusion, num_classes=num_classes, ignore=ignore),
      summarize=_summarize_confusion, asks=False)


def _confusion(logits: Array, labels: Array, num_classes: int, ignore: int) -> Metrics:
  """Counts of pixels by true class (rows) and answer (columns), and the summed cross-entropy."""
  labels = labels.astype(jnp.int32)
  known = labels != ignore
  cells = jnp.where(known, labels * num_classes + argmax(logits), num_classes**2)
  counts = jnp.zeros(num_classes**2, jnp.int32).at[cells].add(1, mode='drop')
  return {
      'confusion': counts.reshape(num_classes, num_classes),
      'cross_entropy': divergence.cross_entropy(logits, labels, ignore).sum(),
      'count': known.sum(),
  }


def _summarize_confusion(sums: Metrics) -> dict[str, float]:
  """Mean over the classes that occur, in truth or answer, of intersection over union."""
  count = count_of(sums)
  confusion = np.asarray(sums['confusion'], np.float64)
  both = np.diagonal(confusion)
  either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
  return {
      'mean_iou': float(np.mean(both[either > 0] / either[either > 0])),
      'pixel_accuracy': float(both.sum()) / count,
      'cross_entropy': float(sums['cross_entropy']) / count,
  }
