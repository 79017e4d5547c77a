"""DAFL: a generator of images that the teacher takes for its own.

Three terms stand in for the data: the teacher is sure of the class that it sees (one_hot), its
features are strong (activation), and a batch has all classes (balance). The student learns from
fresh images of the generator, and does not influence them.

References:
  Chen et al., Data-Free Learning of Student Networks, ICCV 2019,
  https://arxiv.org/abs/1904.01186, equations 4 to 8. Factors and `latent_dim` follow the
  published CIFAR scripts (20 for balance and 0.001 for activation).
"""

import functools

from dfkd_jax.synth import generator_training
from dfkd_jax.synth.latents import Latents
from dfkd_jax.synth.objective import Factors

dafl = functools.partial(
    generator_training.synthesizer,
    factors=Factors(one_hot=1.0, balance=20.0, activation=1e-3),
    latents=Latents(512))
