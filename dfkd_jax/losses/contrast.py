"""Contrast of images with each other, which keeps a replay buffer diverse."""

import jax
import jax.numpy as jnp

from dfkd_jax.types import Array


def contrast(
    local: Array, global_: Array, bank_local: Array, bank_global: Array,
    temperature: float | Array, valid: Array) -> Array:
  """Cross-entropy by which each image's local view finds its own global view among all images: [].

  Contrastive model inversion (CMI, arXiv:2105.08584). Row i of the similarities is the local view
  of image i, column j the global view of image j. The targets are on the diagonal, and the global
  views are constants. Rows of the current batch and of the bank are averaged separately, then
  added. The published code yields NaN whenever its bank is just full. Here only invalid slots are
  left out, and a bank without valid slots adds nothing. The loss is not negative.

  Args:
    local, global_: [B, d], projections of norm 1.
    bank_local, bank_global: [N, d], projections of earlier images; N may be 0.
    temperature: T, above 0.
    valid: [N] bool, whether each slot of the bank holds an image.
  """
  size = local.shape[0]
  rows = jnp.concatenate([local, bank_local])
  columns = jax.lax.stop_gradient(jnp.concatenate([global_, bank_global]))
  present = jnp.concatenate([jnp.ones(size, bool), valid.astype(bool)])
  # An infinite similarity on the diagonal of an empty slot would give NaN gradients.
  lowest = jnp.finfo(rows.dtype).min / 2
  similarities = jnp.where(present, rows @ columns.T / temperature, lowest)
  losses = jax.nn.logsumexp(similarities, axis=-1) - jnp.diagonal(similarities)
  bank_losses = jnp.where(present, losses, 0)[size:]
  return losses[:size].mean() + bank_losses.sum() / jnp.maximum(present[size:].sum(), 1)
