"""ZSKT: a generator that seeks only images on which student and teacher disagree.

Generator and student play against each other over KL(teacher || student) at temperature 1 of all
images: one raises it, the other lowers it. In the paper the student also matches the teacher's
attention maps; that is part of its own loss, `distill.attention_factor` of a config.

References:
  Micaelli and Storkey, Zero-shot Knowledge Transfer via Adversarial Belief Matching, NeurIPS 2019,
  https://arxiv.org/abs/1905.09768, equation 1 and algorithm 1; numbers follow the published
  CIFAR script. The adversary is the student: one public code base passes the teacher there. Its
  divergence from itself is 0, so the generator learns nothing.
"""

import functools

from dfkd_jax.synth import generator_training
from dfkd_jax.synth.objective import Factors

zskt = functools.partial(
    generator_training.synthesizer,
    factors=Factors(adversarial=1.0))
