"""What images are for: one class an image, or one a pixel.

The library asks a task for whatever depends on that, and else does not know which
it serves; losses take either without change, since they keep leading axes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from dfkd_jax.types import Array, Metrics


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


def argmax(scores: Array) -> Array:
  """Index of the largest score over the last axis, int32."""
  return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def count_of(sums: Metrics) -> int:
  """Number of labelled examples; raises ValueError if there are none."""
  count = int(sums['count'])
  if count == 0:
    raise ValueError('count is 0: there is no labelled example to report on')
  return count
