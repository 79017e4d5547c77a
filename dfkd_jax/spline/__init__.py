"""Spline-initialised fully connected layers: fit hinges, turn them into a network, fine-tune."""

from dfkd_jax.spline.compression import compress
from dfkd_jax.spline.fit import hinge_fit
from dfkd_jax.spline.head_init import FittedHead, fit_head
from dfkd_jax.spline.model import HingeModel, format_terms
from dfkd_jax.spline.network import ReluNetwork, hinge_mask, mask_updates, relu_network

__all__ = ('FittedHead', 'HingeModel', 'ReluNetwork', 'compress', 'fit_head', 'format_terms',
           'hinge_fit', 'hinge_mask', 'mask_updates', 'relu_network')
