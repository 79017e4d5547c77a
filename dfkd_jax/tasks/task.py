"""A task: one class per image, or one class per pixel.

The library asks it for everything that depends on this, except for losses: they keep leading axes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from dfkd_jax.types import Array, Metrics


class Task(NamedTuple):
  """A task, as a tuple of functions.

  Logits are [B, K] in classification and [B, H, W, K] in segmentation. Labels have no class axis.
  """

  num_classes: int  # K
  # (key, batch_size, histogram [K] | None) -> [B] int32, classes to request.
  sample_labels: Callable[..., Array]
  # (logits, requested [B] | None) -> int32 targets of the one_hot term.
  labels_from: Callable[..., Array]
  # (logits) -> [B] int32, one class per image, for the replay buffer.
  predicted: Callable[[Array], Array]
  # (logits, labels) -> sums over this batch, to be added up over batches.
  metrics: Callable[[Array, Array], Metrics]
  # (sums) -> metrics to report. Higher is better, except for the loss.
  summarize: Callable[[Metrics], dict[str, float]]
  asks: bool = True  # whether a class can be requested; if not, `sample_labels` is not used

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
