"""Real images, for evaluation and for training teachers."""

from dfkd_jax.data.tfds import EMBEDDED, Dataset, find_prepared, is_prepared, load

__all__ = ['EMBEDDED', 'Dataset', 'find_prepared', 'is_prepared', 'load']
