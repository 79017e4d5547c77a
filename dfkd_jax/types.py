"""Names for what travels between the parts of the library.

Letters for shapes, everywhere: B batch, H W pixels, C channels, K classes,
Z latent, D features, N slots of the replay buffer, M tasks.
"""

from typing import Any, NamedTuple

import jax

Array = jax.Array
PRNGKey = jax.Array
PyTree = Any
Metrics = dict[str, jax.Array]


class Moments(NamedTuple):
  """Mean and variance of the input of one batch normalisation."""

  mean: Array  # [C]
  var: Array  # [C], biased


class Outputs(NamedTuple):
  """All that a network has to say about a batch; jit prunes what is unused."""

  logits: Array  # [B, K] or [B, H, W, K]
  features: Array | None  # [B, D], input of the last layer, pooled
  maps: tuple[Array, ...]  # [B, h, w, c] after each stage
  moments: dict[str, Moments]  # of this batch, by path of the batch norm
  pooled: dict[str, Array]  # [B, C], mean over pixels of each image, of the same inputs


class Batch(NamedTuple):
  """What the student is given in one step."""

  images: Array | None  # [B, H, W, C] float, in [0, 1]; None: elsewhere, see synth/replay.py
  labels: Array  # [B] int32, the teacher's class
  slots: Array  # [B] int32, where in the replay buffer; -1 if from nowhere
