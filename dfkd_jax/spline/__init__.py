"""Spline-initialised fully connected layers: fit hinges, turn them into a network, fine-tune."""

from dfkd_jax.spline.hinge_fit import HingeModel, hinge_fit, table

__all__ = ('HingeModel', 'hinge_fit', 'table')
