"""DFAD: a generator that seeks images on which student and teacher differ, by L1.

Generator and student play against each other over the mean absolute difference of logits. Its
gradient does not fade as they come close.

References:
  Fang et al., Data-Free Adversarial Distillation, 2019, https://arxiv.org/abs/1912.11006,
  equations 4 and 5; numbers follow the published CIFAR script. The published segmentation
  script takes -log(1 + L1) for the generator; the script for CIFAR, followed here, takes -L1.
"""

import functools

from dfkd_jax.synth import generator_training
from dfkd_jax.synth.objective import Adversary, Factors

dfad = functools.partial(
    generator_training.synthesizer,
    factors=Factors(adversarial=1.0),
    adversary=Adversary('l1', masked=False))
