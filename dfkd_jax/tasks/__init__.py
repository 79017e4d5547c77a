"""What a teacher was trained for: labels to ask for, reduction, metrics."""

from dfkd_jax.tasks.classification import classification, shortfall
from dfkd_jax.tasks.segmentation import segmentation
from dfkd_jax.tasks.task import Task

__all__ = ['Task', 'classification', 'segmentation', 'shortfall']
