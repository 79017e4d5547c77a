"""ZSKT: a generator that seeks what student and teacher disagree on, and nothing else.

Generator and student play against each other over KL(teacher || student): one
raises it, the other lowers it. In the paper the student also matches the
teacher's attention maps; that is its own loss, `distill.attention_factor` of a config.

References:
  Micaelli and Storkey, Zero-shot Knowledge Transfer via Adversarial Belief Matching,
  NeurIPS 2019, https://arxiv.org/abs/1905.09768, equation 1 and algorithm 1.
  The adversary is the student: one public code base passes the teacher there, whose
  divergence from itself is 0, so that its generator learns nothing.
"""

from typing import Any

from dfkd_jax.synth import generator_training, objective
from dfkd_jax.synth.synthesizer import Synthesizer, passes_on

State = generator_training.State


@passes_on(generator_training.synthesizer)
def zskt(
    *,
    factors: objective.Factors = objective.Factors(adversarial=1.0),
    adversary: objective.Adversary = objective.Adversary(masked=False),
    **numbers: Any,
) -> Synthesizer:
  """Makes the ZSKT synthesizer; defaults are those of the published CIFAR script.

  Args:
    factors: Of adversarial.
    adversary: KL at temperature 1, of all images.
    **numbers: Of `online.synthesizer`.
  """
  return generator_training.synthesizer(factors=factors, adversary=adversary, **numbers)
