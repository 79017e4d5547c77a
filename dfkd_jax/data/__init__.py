"""Real images, for evaluation and for training teachers."""

from dfkd_jax.data.tfds import EMBEDDED, Dataset, check_prepared, is_prepared, load

__all__ = ['EMBEDDED', 'Dataset', 'check_prepared', 'is_prepared', 'load']
