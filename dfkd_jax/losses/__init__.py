"""Losses: arrays in, arrays out; every one is to be minimised.

The class axis is last and leading axes are free, so that segmentation is no
special case. Nothing is reduced over the batch or over pixels, save in terms
that are statements about a whole batch (`inversion.balance`,
`inversion.batch_norm`, `inversion.l2`, `contrast.contrast`).
"""

from dfkd_jax.losses import contrast, divergence, inversion

__all__ = ['contrast', 'divergence', 'inversion']
