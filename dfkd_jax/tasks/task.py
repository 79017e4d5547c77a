"""A task: one class per image, or one class per pixel.

The library asks a task for everything that depends on this. Losses keep leading axes, and need no
task.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from dfkd_jax.types import Array, Metrics


class Task(NamedTuple):
  """A task, as a tuple of functions.

  Logits are [B, K] in classification and [B, H, W, K] in segmentation. Labels have no class axis.

  Attributes:
    num_classes: K.
    sample_labels: (key, batch_size, histogram [K] | None) -> [B] int32, classes to request.
    labels_from: (logits, requested [B] | None) -> int32 targets of the one_hot term.
    predicted: (logits) -> [B] int32, one class per image, for the replay buffer.
    metrics: (logits, labels) -> sums over this batch, to be added up over batches.
    summarize: (sums) -> metrics to report. Higher is better, except for the loss.
    asks: Whether a class can be requested; if not, `sample_labels` is not used.
  """

  num_classes: int
  sample_labels: Callable[..., Array]
  labels_from: Callable[..., Array]
  predicted: Callable[[Array], Array]
  metrics: Callable[[Array, Array], Metrics]
  summarize: Callable[[Metrics], dict[str, float]]
  asks: bool = True

  def reduce(self, per_element: Array) -> Array:
    """Mean over all axes but the batch: [B, ...] -> [B]."""
    return per_element.reshape(per_element.shape[0], -1).mean(axis=1)


def argmax(scores: Array) -> Array:
  """Index of the largest score over the last axis, int32."""
  return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def count_of(sums: Metrics) -> int:
  """Number of labelled examples; raises ValueError if there are none."""
  count = int(sums['count'])
  if count == 0:
    raise ValueError('count is 0: there is no labelled example to report on')
  return count
