"""CMI. arXiv:2105.08584; for CIFAR the numbers of the published scripts.

Cost: 200 calls of 200 inner steps on 256 images (the papers' tables have 500), each with two views
and 4,096 rows of the bank; 80,000 student steps of 256.
The bank takes 2 x 40,960 x D numbers, with D the channels of all batch norms: 0.9 GB for WRN-40-2
(2,704), 2.8 GB for ResNet-34 (8,512). The published program takes 512 of these, chosen by hand:
--config.method.feature_layers=... .
Published (best epoch, 500 steps; the third number started from 50,000 earlier images, 88.82 without
them), R34-R18, V11-R18, W40-2-W16-1, W40-2-W40-1, W40-2-W16-2:
  CIFAR-10 94.84 91.13 90.01 92.78 92.52, CIFAR-100 77.04 70.56 57.91 68.88 68.75
Command: python main.py --config=configs/cifar10.py:cmi,wrn40_2-wrn16_1 --workdir=...
  --config.teacher.source=...
"""

from ml_collections import config_dict


def cifar(config):
  """Sets the published numbers for CIFAR."""
  config.method.update(
      name='cmi', num_steps=200, generator_lr=1e-3, latent_lr=1e-3, latent_dim=256, adam_b1=0.5,
      adam_b2=0.999, meta='reinit', keep='best', moments_momentum=0.0, adversarial_after=0,
      contrast_temperature=0.2, bank_size=40_960, num_negatives=4_096, projection_size=256,
      feature_layers=config_dict.placeholder(tuple), head_lr=config_dict.placeholder(float),
      batch_size=256, capacity=200 * 256, num_tasks=1, task_map='auto')
  config.generator.update(name='generator', options=dict(width=64))
  config.factors.update(batch_norm=1.0, one_hot=1.0, adversarial=0.5, contrast=0.8)
  config.distill.update(
      rounds=200, steps_per_round=400, distill_after=0, batch_size=256, temperature=20.0)
  config.optimizer.update(name='sgd', learning_rate=0.1, momentum=0.9, weight_decay=1e-4,
                          schedule='cosine_by_round', end_value=2e-4)


def quickstart(config):
  """Sets numbers for the quick start."""
  config.method.update(
      name='cmi', num_steps=50, generator_lr=3e-3, latent_lr=3e-3, latent_dim=64, meta='reinit',
      adversarial_after=2, contrast_temperature=0.2, bank_size=4_096, num_negatives=512,
      projection_size=64, batch_size=128, capacity=12_800, num_tasks=1)
  config.factors.update(batch_norm=1.0, one_hot=1.0, adversarial=0.5, contrast=0.8)
  config.distill.update(rounds=40, steps_per_round=240, distill_after=2)
  config.evaluate.every = 5
  config.checkpoint.every = 4
