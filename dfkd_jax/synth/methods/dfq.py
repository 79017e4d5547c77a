"""DFQ: an adversarial generator that is held to the teacher's batch-norm moments.

Four terms: the moments of the teacher's inputs are those of training (batch_norm),
the teacher is sure of a class that it sees itself (one_hot), a batch has all classes (balance),
and student and teacher disagree (adversarial).

References:
  Choi et al., Data-Free Network Quantization With Adversarial Knowledge Distillation,
  CVPR Workshops 2020, https://arxiv.org/abs/2005.04136. Factors are those of the
  published CIFAR scripts.
"""

from typing import Any

from dfkd_jax.synth import generator_training, objective
from dfkd_jax.synth.synthesizer import Synthesizer, passes_on

State = generator_training.State


@passes_on(generator_training.synthesizer)
def dfq(
    *,
    factors: objective.Factors = objective.Factors(
        batch_norm=1.0, one_hot=1.0, balance=20.0, adversarial=1.0),
    adversary: objective.Adversary = objective.Adversary(masked=False),
    **numbers: Any,
) -> Synthesizer:
  """Makes the DFQ synthesizer; defaults are those of the published CIFAR script.

  Args:
    factors: Of batch_norm, one_hot, balance and adversarial.
    adversary: KL at temperature 1, of all images.
    **numbers: Of `online.synthesizer`.
  """
  return generator_training.synthesizer(factors=factors, adversary=adversary, **numbers)
