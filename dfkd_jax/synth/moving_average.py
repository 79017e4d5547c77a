"""Moving average of a generator: half of the student's images come from it.

The student learns from the images of the generator and of its average, so that it does not
forget earlier images. In the paper each has a batch of its own; here they share one batch, so
that the student's step costs the same.

References:
  Do et al., Momentum Adversarial Distillation, NeurIPS 2022, https://arxiv.org/abs/2209.10359.
  Its decay of 0.95 is quoted second hand.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from dfkd_jax.messages import FieldError
from dfkd_jax.synth.layout import Layout
from dfkd_jax.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class MovingAverage:
  """A moving average of the generator: ema <- ema_decay * ema + (1 - ema_decay) * params."""

  ema_decay: float | None = None  # in [0, 1); None: there is no average
  ema_share: float = 0.5  # fraction of the student's images that the average renders

  def num_images(self, layout: Layout, is_new_every_call: bool = False) -> int:
    """Returns how many images of a task's share in one student step the average renders.

    Raises:
      FieldError: The decay is not in [0, 1), the share leaves no image to one of the two, or each
        call has a generator of its own, which has no average.
    """
    if self.ema_decay is None:
      return 0
    if is_new_every_call:
      raise FieldError('ema_decay', f'ema_decay is {self.ema_decay}, must be None where each call '
                       'has a generator of its own.')
    if not 0 <= self.ema_decay < 1:
      raise FieldError('ema_decay', f'ema_decay is {self.ema_decay}, must be in [0, 1), '
                       'or None for no moving average.')
    total = layout.share(layout.sample_batch_size, 'sample_batch_size')
    number = round(self.ema_share * total)
    if not 1 <= number < total:
      raise FieldError('ema_share', f'ema_share is {self.ema_share}, must leave at least one of '
                       f'the {total} images of a task in one student step to the generator, and '
                       'one to its moving average.')
    return number

  def init(self, variables: PyTree) -> PyTree | None:
    """Returns the average of a new generator; None if there is none."""
    # A copy, since states are donated.
    return None if self.ema_decay is None else jax.tree.map(jnp.copy, variables)

  def update(self, ema: PyTree | None, variables: PyTree, is_new: Array | bool) -> PyTree | None:
    """Moves the average towards `variables`, or sets it to them if the generator is new."""
    if self.ema_decay is None:
      return None
    return optax.incremental_update(variables, ema, jnp.where(is_new, 1, 1 - self.ema_decay))


def append_images(batch: Batch, images: Array) -> Batch:
  """Appends images to each task's part of a batch, with labels and slots of -1.

  Args:
    batch: Of M tasks; its images may be None, if they are on the host.
    images: [M, n, H, W, C].
  """
  num_tasks, number = images.shape[:2]

  def append(part: Array, new: Array) -> Array:
    by_task = part.reshape(num_tasks, -1, *part.shape[1:])
    joined = jnp.concatenate([by_task, new.astype(part.dtype)], axis=1)
    return joined.reshape(-1, *part.shape[1:])

  unknown = jnp.full((num_tasks, number), -1, jnp.int32)
  images = None if batch.images is None else append(batch.images, images)
  return Batch(images, append(batch.labels, unknown), append(batch.slots, unknown))
