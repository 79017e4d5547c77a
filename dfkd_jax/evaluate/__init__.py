"""How good a student is, on real images or on fresh synthetic ones."""

from dfkd_jax.evaluate.real_images import evaluate, predict

__all__ = ['evaluate', 'predict']
