"""Tasks that teachers are trained for: labels to request, reduction, metrics."""

from dfkd_jax.tasks.classification import classification, shortfall
from dfkd_jax.tasks.segmentation import segmentation
from dfkd_jax.tasks.task import Task

__all__ = ['Task', 'classification', 'segmentation', 'shortfall']
