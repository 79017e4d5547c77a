"""Types shared by the parts of the library.

Letters for shapes: B batch, H W pixels, C channels, K classes, Z latent, D features, N slots of
the replay buffer, M tasks.
"""

from typing import Any, NamedTuple

import jax

Array = jax.Array
PRNGKey = jax.Array
PyTree = Any
Metrics = dict[str, jax.Array]


class Moments(NamedTuple):
  """Mean and variance of the input of one batch norm."""

  mean: Array  # [C]
  var: Array  # [C], biased


class Outputs(NamedTuple):
  """Outputs of a network for a batch; `jit` prunes unused ones."""

  logits: Array  # [B, K] or [B, H, W, K]
  features: Array | None  # [B, D], pooled input of the last layer
  maps: tuple[Array, ...]  # [B, h, w, c] after each stage
  moments: dict[str, Moments]  # of this batch, by path of the batch norm
  pooled: dict[str, Array]  # [B, C], mean over the pixels of each batch norm's input


class Batch(NamedTuple):
  """One training batch of the student."""

  images: Array | None  # [B, H, W, C] float in [0, 1]; None if on the host, see synth/replay.py
  labels: Array  # [B] int32, the teacher's class
  slots: Array  # [B] int32, indices into the replay buffer; -1 for images outside of it
