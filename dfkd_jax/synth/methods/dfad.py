"""DFAD: a generator that seeks images on which student and teacher answer differently, by L1.

Generator and student play against each other over the mean absolute difference of
logits, whose gradient does not fade as they come close.

References:
  Fang et al., Data-Free Adversarial Distillation, 2019, https://arxiv.org/abs/1912.11006,
  equations 4 and 5. The published segmentation script takes -log(1 + L1) for the
  generator; CIFAR's, followed here, takes -L1.
"""

from typing import Any

from dfkd_jax.synth import generator_training, objective
from dfkd_jax.synth.synthesizer import Synthesizer, passes_on

State = generator_training.State


@passes_on(generator_training.synthesizer)
def dfad(
    *,
    factors: objective.Factors = objective.Factors(adversarial=1.0),
    adversary: objective.Adversary = objective.Adversary('l1', masked=False),
    **numbers: Any,
) -> Synthesizer:
  """Makes the DFAD synthesizer; defaults are those of the published CIFAR script.

  Args:
    factors: Of adversarial.
    adversary: L1 of logits, of all images.
    **numbers: Of `online.synthesizer`.
  """
  return generator_training.synthesizer(factors=factors, adversary=adversary, **numbers)
