"""Numbers that the methods with one lasting generator share: DAFL, ZSKT, DFQ, DFAD and CuDFKD.

On CIFAR the generator is the large one of the earlier code base, which gave the published
accuracies. Its images are sampled by running moments and not augmented. The student: SGD 0.1 over
200 rounds of 400 steps, temperature 1 (the scripts ask for 20, which the driver drops). For
CIFAR-100, two tables of the same authors differ by up to 26 points. The methods' files have
FastDFKD's (DAFL, WRN-40-2 to WRN-16-2: 43.70, elsewhere 40.00).
"""

from configs import common


def cifar(config, name: str, *, calls: int, latent_dim: int = 256, divergence: str = 'kl',
          **factors: float):
  """Sets the published numbers for CIFAR; `calls` is the generator's steps in a round."""
  config.method.update(
      name=name, num_steps=1, latent_dim=latent_dim, generator_lr=1e-3,
      generator_schedule='constant', adam_b1=0.5, adam_b2=0.999, sample_by='running',
      batch_size=256, num_tasks=1, **common.averaged())
  config.generator.update(name='generator', options=dict(width=64, stem_width=256))
  config.factors.update(**factors)
  config.augment.student.name = 'none'
  config.distill.update(
      rounds=200, calls_per_round=calls, steps_per_round=400, distill_after=0, batch_size=256,
      temperature=1.0, divergence=divergence)
  config.optimizer.update(name='sgd', learning_rate=0.1, momentum=0.9, weight_decay=1e-4,
                          schedule='cosine_by_round', end_value=2e-4)


def camvid(config, name: str, **factors: float):
  """Sets numbers for CamVid on a CPU: five steps of the generator in a round."""
  config.method.update(
      name=name, num_steps=1, latent_dim=64, generator_lr=1e-3, generator_schedule='cosine',
      sample_by='batch', batch_size=16, num_tasks=1, **common.averaged())
  config.factors.update(**factors)
  config.distill.update(calls_per_round=5, distill_after=0)


def quickstart(config, name: str, *, calls: int, **factors: float):
  """Sets numbers for the quick start; `calls` is the generator's steps in a round."""
  config.method.update(
      name=name, num_steps=1, latent_dim=64, generator_lr=3e-3, generator_schedule='constant',
      sample_by='running', batch_size=128, num_tasks=1, **common.averaged())
  config.factors.update(**factors)
  config.distill.update(calls_per_round=calls, distill_after=0)
