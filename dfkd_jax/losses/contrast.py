"""Contrast of images with each other, which keeps a replay buffer diverse."""

import jax
import jax.numpy as jnp

from dfkd_jax.types import Array


def contrast(
    local: Array,
    global_: Array,
    bank_local: Array,
    bank_global: Array,
    temperature: float | Array,
    valid: Array,
) -> Array:
  """Each image's local view is to find its own global view among all images.

  Contrastive model inversion (CMI, arXiv:2105.08584). Row i of the
  similarities is the local view of image i, column j the global view of image j;
  the targets are on the diagonal, and the global views are constants. Rows of
  the current batch and those of the bank are averaged apart, then added. The
  published code yields NaN whenever its bank is just full; here only the invalid
  slots are left out, and without any valid one the batch stands alone.

  Args:
    local: [B, d], projections of norm 1.
    global_: [B, d], projections of norm 1.
    bank_local: [N, d], those of earlier images; N may be 0.
    bank_global: [N, d].
    temperature: T, above 0.
    valid: [N] bool, which slots of the bank hold an image.

  Returns:
    [], not negative.
  """
  size = local.shape[0]
  rows = jnp.concatenate([local, bank_local])
  columns = jax.lax.stop_gradient(jnp.concatenate([global_, bank_global]))
  present = jnp.concatenate([jnp.ones(size, bool), valid.astype(bool)])
  # Finite, since an infinite similarity on the diagonal of an empty slot gives NaN gradients.
  similarities = jnp.where(present, rows @ columns.T / temperature, jnp.finfo(rows.dtype).min / 2)
  losses = jax.nn.logsumexp(similarities, axis=-1) - jnp.diagonal(similarities)
  cached = jnp.where(present, losses, 0)[size:]
  return losses[:size].mean() + cached.sum() / jnp.maximum(present[size:].sum(), 1)
