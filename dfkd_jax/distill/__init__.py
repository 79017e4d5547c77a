"""The student: its training step, its steps of a round, its optimizers."""

from dfkd_jax.distill.distill import distill, sampled_indices
from dfkd_jax.distill.optimizers import cosine_by_round, coupled_sgd
from dfkd_jax.distill.student import Student, divergence, init, train_step

__all__ = [
    'Student', 'cosine_by_round', 'coupled_sgd', 'distill', 'divergence', 'init',
    'sampled_indices', 'train_step',
]
