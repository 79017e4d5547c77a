"""DAFL: a generator whose images the teacher takes for its own.

Three terms stand in for the data: the teacher is sure of a class (one_hot, of the
class that it sees itself), its features are strong (activation), and a batch has
all classes (balance). The student learns from fresh images of the generator; it has no say in
what they are.

References:
  Chen et al., Data-Free Learning of Student Networks, ICCV 2019,
  https://arxiv.org/abs/1904.01186, equations 4 to 8. Factors are those of the
  published CIFAR scripts (20 for balance and 0.001 for activation).
"""

from typing import Any

from dfkd_jax.synth import generator_training, objective
from dfkd_jax.synth.synthesizer import Synthesizer, passes_on

State = generator_training.State


@passes_on(generator_training.synthesizer)
def dafl(
    *,
    factors: objective.Factors = objective.Factors(one_hot=1.0, balance=20.0, activation=1e-3),
    latent_dim: int = 512,
    **numbers: Any,
) -> Synthesizer:
  """Makes the DAFL synthesizer; defaults are those of the published CIFAR script.

  Args:
    factors: Of one_hot, balance and activation.
    latent_dim: Z.
    **numbers: Of `online.synthesizer`.
  """
  return generator_training.synthesizer(factors=factors, latent_dim=latent_dim, **numbers)
