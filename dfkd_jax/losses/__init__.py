"""Losses: arrays in, arrays out; all are minimized.

The class axis is last and leading axes are free, so that segmentation is no special case. Losses
are not reduced over the batch or over pixels, except for terms about a whole batch:
`inversion.balance`, `inversion.batch_norm`, `inversion.l2`, `inversion.contrast`, and
`inversion.adversarial` with the divergence 'log_l1'.
"""

from dfkd_jax.losses import divergence, inversion, labels

__all__ = ['divergence', 'inversion', 'labels']
