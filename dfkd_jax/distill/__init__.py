"""The student: its training step, its steps of a round, its optimizers."""
# ruff: noqa: I001 (imports are wrapped by hand)

from dfkd_jax.distill.distill import distill, sampled_indices
from dfkd_jax.distill.student import (
    REPLACED, Student, cosine_by_round, coupled_sgd, divergence, init, replace_layers, train_step)

__all__ = ['REPLACED', 'Student', 'cosine_by_round', 'coupled_sgd', 'distill', 'divergence', 'init',
           'replace_layers', 'sampled_indices', 'train_step']
