"""Moving average of a generator (momentum adversarial distillation)."""

import jax.numpy as jnp

from dfkd_jax.types import Array, Batch


def num_averaged(ema_decay: float | None, ema_share: float, number: int) -> int:
  """How many of the student's `number` images the moving average of a generator makes; 0 if there is none.

  The average follows the generator as theta' <- ema_decay theta' + (1 - ema_decay) theta, and the student learns from
  the images of both, so that it does not forget what the generator made before (MAD: Do et al., Momentum Adversarial
  Distillation, NeurIPS 2022, https://arxiv.org/abs/2209.10359, with a decay of 0.95, second hand). There each has a
  batch of its own; here they share one, so that the student's step costs what it did.

  Raises:
    ValueError: The decay is not in [0, 1), or the share leaves no image to one of the two.
  """
  if ema_decay is None:
    return 0
  if not 0 <= ema_decay < 1:
    raise ValueError(f'ema_decay is {ema_decay}, must be in [0, 1), or None for no moving average.')
  found = round(ema_share * number)
  if not 1 <= found < number:
    raise ValueError(
        f'ema_share is {ema_share}, must leave of the {number} images of a task in one student step at least one to '
        'the generator and one to its moving average.')
  return found


def append_images(batch: Batch, images: Array) -> Batch:
  """A batch of M tasks with further images [M, n, H, W, C], each task's behind its own; they are from nowhere, -1.

  A batch whose images are elsewhere gets none, but their slots.
  """
  num_tasks, number = images.shape[:2]

  def joined(own: Array, further: Array) -> Array:
    by_task = own.reshape(num_tasks, -1, *own.shape[1:])
    return jnp.concatenate([by_task, further.astype(own.dtype)], axis=1).reshape(-1, *own.shape[1:])

  nowhere = jnp.full((num_tasks, number), -1, jnp.int32)
  images = None if batch.images is None else joined(batch.images, images)
  return Batch(images, joined(batch.labels, nowhere), joined(batch.slots, nowhere))
