"""What the configs of DAFL, ZSKT, DFQ and DFAD on CIFAR share: the published scripts' numbers.

A lasting generator, the large one of the earlier code base, from which the published accuracies come; its images are
sampled by running moments and not augmented. The student: SGD 0.1 over 200 rounds of 400 steps, temperature 1 (the
scripts ask for 20, which the driver drops). For CIFAR-100, two tables of the same authors differ by up to 26 points;
the methods' files have FastDFKD's (DAFL, WRN-40-2 to WRN-16-2: 43.70, elsewhere 40.00).
"""

from configs import common


def apply(config, name: str, *, calls: int, latent_dim: int = 256, divergence: str = 'kl', **factors: float):
  """Sets the numbers; `calls` is how often a round goes back to the generator."""
  config.method.update(
      name=name, num_steps=1, latent_dim=latent_dim, generator_lr=1e-3, generator_schedule='constant', adam_b1=0.5,
      adam_b2=0.999, sample_by='running', batch_size=256, num_tasks=1, **common.averaged())
  config.generator.update(name='generator', options=dict(width=64, stem_width=256))
  config.factors.update(**factors)
  config.augment.student.name = 'none'
  config.distill.update(
      rounds=200, calls_per_round=calls, steps_per_round=400, distill_after=0, batch_size=256, temperature=1.0,
      divergence=divergence)
  config.optimizer.update(
      name='sgd', learning_rate=0.1, momentum=0.9, weight_decay=1e-4, schedule='cosine_by_round', end_value=2e-4)
  return config
