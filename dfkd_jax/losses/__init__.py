"""Losses: arrays in, arrays out; all are minimized.

The class axis is last and leading axes are free, so that segmentation is no special case. Losses
are not reduced over the batch or over pixels, except for terms about a whole batch:
`inversion.balance`, `inversion.batch_norm`, `inversion.l2` and `inversion.contrast`.
"""

from dfkd_jax.losses import divergence, inversion

__all__ = ['divergence', 'inversion']
