"""Segmentation: one class per pixel."""

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.losses import divergence
from dfkd_jax.tasks.task import Task, argmax, count_of


def segmentation(num_classes: int, ignore: int = 255) -> Task:
  """Makes the task of one class per pixel.

  A map of classes cannot be requested without real maps at hand. The targets are therefore the
  teacher's own predictions at each pixel: `sample_labels` returns zeros, and `labels_from`
  ignores them. Metrics skip unlabelled pixels, which have the label `ignore`. The mean
  intersection over union is over the classes that occur, in truth or prediction.
  """

  def sample_labels(key, batch_size, histogram=None):
    return jnp.zeros(batch_size, jnp.int32)

  def labels_from(logits, requested=None):
    return argmax(logits)

  def predicted(logits):
    pixels = jax.nn.one_hot(argmax(logits), num_classes, dtype=jnp.int32)
    return argmax(pixels.sum(axis=tuple(range(1, pixels.ndim - 1))))

  def metrics(logits, labels):
    labels = labels.astype(jnp.int32)
    is_known = labels != ignore
    cells = jnp.where(is_known, labels * num_classes + argmax(logits), num_classes**2)
    counts = jnp.zeros(num_classes**2, jnp.int32).at[cells].add(1, mode='drop')
    return {'confusion': counts.reshape(num_classes, num_classes),  # true class, prediction
            'cross_entropy': divergence.cross_entropy(logits, labels, ignore).sum(),
            'count': is_known.sum()}

  def summarize(sums):
    count = count_of(sums)
    confusion = np.asarray(sums['confusion'], np.float64)
    both = np.diagonal(confusion)
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    occurs = either > 0
    return {'mean_iou': float(np.mean(both[occurs] / either[occurs])),
            'pixel_accuracy': float(both.sum()) / count,
            'cross_entropy': float(sums['cross_entropy']) / count}

  return Task(num_classes, sample_labels, labels_from, predicted, metrics, summarize, asks=False)
