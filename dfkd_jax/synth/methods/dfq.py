"""DFQ: an adversarial generator that is held to the teacher's batch-norm moments.

Four terms: the teacher's inputs have the moments of training (batch_norm), the teacher is sure
of the class that it sees (one_hot), a batch has all classes (balance), and student and
teacher disagree (adversarial, KL at temperature 1 of all images).

References:
  Choi et al., Data-Free Network Quantization With Adversarial Knowledge Distillation, CVPR
  Workshops 2020, https://arxiv.org/abs/2005.04136. Factors follow the published CIFAR scripts.
"""

import functools

from dfkd_jax.synth import generator_training
from dfkd_jax.synth.objective import Factors

dfq = functools.partial(
    generator_training.synthesizer,
    factors=Factors(batch_norm=1.0, one_hot=1.0, balance=20.0, adversarial=1.0))
