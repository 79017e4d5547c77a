"""FastDFKD. arXiv:2112.06253, tables 1 to 3.

The numbers for CIFAR are from the published scripts. The published ImageNet scripts do not run, so
these numbers are from the published logs.

Cost on CIFAR: 220 calls of 2, 5 or 10 inner steps on 256 images, 80,000 student steps of 256.
  WRN-40-2 -> WRN-16-1: 17, 17 and 18 PFLOP end to end; ResNet-34 -> ResNet-18: 117 to 120.
Published (best epoch, one seed), CIFAR-10 / CIFAR-100, R34-R18, V11-R18, W40-2-W16-1, W40-2-W40-1,
W40-2-W16-2:
  Fast-2   92.62 84.67 88.36 89.56 89.68 / 69.76 62.83 41.77 53.15 57.08
  Fast-5   93.63 89.94 88.90 92.04 91.96 / 72.82 65.28 52.90 61.80 63.83
  Fast-10  94.05 90.53 89.29 92.51 92.45 / 74.34 67.44 54.02 63.91 65.12
Command: python main.py --config=configs/cifar10.py:fast_dfkd,fast5,wrn40_2-wrn16_1 --workdir=...
  --config.teacher.source=...
"""

from ml_collections import config_dict

from configs import common

VARIANTS = {  # num_steps, generator_lr, latent_lr; meta_lr is generator_lr * num_steps
    'fast5': (5, 3e-3, 1e-2),
    'fast2': (2, 5e-3, 1.5e-2),
    'fast10': (10, 2e-3, 1e-2),
}
FACTORS = {  # adversarial, one_hot, by teacher
    'resnet34': (1.33, 0.5),
    'vgg11': (1.0, 0.5),
    'wrn40_2': (1.1, 0.4),
}


def cifar(config, variant: str):
  """Sets the published numbers of a variant for the teacher of the config."""
  num_steps, generator_lr, latent_lr = VARIANTS[variant]
  config.method.update(
      name='fast_dfkd', num_steps=num_steps, generator_lr=generator_lr, latent_lr=latent_lr,
      latent_dim=256, adam_b1=0.5, adam_b2=0.999, meta='fomaml',
      meta_lr=config_dict.placeholder(float), reptile_scale=67.0, moments_momentum=0.9,
      adversarial_after=19, reset_after=139, keep='best', batch_size=256, capacity=220 * 256,
      num_tasks=1, task_map='auto', **common.averaged())
  config.generator.update(name='generator', options=dict(width=64))
  # Teachers that are not in the paper get the factors of its WRN.
  adversarial, one_hot = FACTORS.get(config.teacher.name, FACTORS['wrn40_2'])
  config.factors.update(batch_norm=10.0, one_hot=one_hot, adversarial=adversarial)
  config.distill.update(
      rounds=220, steps_per_round=400, distill_after=20, batch_size=256, temperature=20.0)
  config.optimizer.update(name='sgd', learning_rate=0.2, momentum=0.9, weight_decay=1e-4,
                          schedule='cosine_by_round', end_value=2e-4)


def camvid(config):
  """Sets numbers for CamVid on a CPU. An adversary gained nothing, in one run."""
  config.method.update(
      name='fast_dfkd', num_steps=10, generator_lr=3e-3, latent_lr=0.1, latent_dim=64,
      meta='fomaml', moments_momentum=0.9, adversarial_after=20, batch_size=16, capacity=16_000,
      num_tasks=1, **common.averaged())
  config.factors.update(relative_batch_norm=1.0, one_hot=0.5, balance=0.5)


def quickstart(config):
  """Sets numbers for the quick start."""
  config.method.update(
      name='fast_dfkd', num_steps=20, generator_lr=3e-3, latent_lr=0.1, latent_dim=64,
      meta='fomaml', moments_momentum=0.9, adversarial_after=9, batch_size=128, capacity=12_800,
      num_tasks=1, **common.averaged())
  config.factors.update(batch_norm=10.0, one_hot=1.0, adversarial=1.0)
  config.distill.update(rounds=84, steps_per_round=120)
  config.evaluate.every = 12
  config.checkpoint.every = 6


def imagenet(config, adversarial: float):
  """Sets the numbers of the published ImageNet logs (Fast-50).

  The logs have 400 epochs of 10 calls, each followed by 100 student steps. They began with 140,000
  images of 1,400 earlier calls without a student, which are the first 140 rounds here.
  """
  config.method.update(
      name='fast_dfkd', num_steps=50, generator_lr=2e-4, latent_lr=1e-2, latent_dim=256,
      adam_b1=0.5, adam_b2=0.999, meta='reptile', meta_lr=1e-4, reptile_scale=1.0,
      carry_latents=True, restart_every=50, keep='last', moments_momentum=0.9,
      adversarial_after=1400, batch_size=100, capacity=540_000, num_tasks=1, task_map='auto',
      **common.averaged())
  config.generator.update(
      name='spatial_generator', options=dict(widths=(128, 128, 64, 64, 64), last='conv'))
  config.factors.update(batch_norm=0.1, one_hot=0.1, adversarial=adversarial)
  config.augment.synthesis.update(
      name='resized_crop_and_flip', scale=(0.75, 1.0), align_corners=True)
  config.augment.student.update(
      name='resized_crop_and_flip', scale=(0.08, 1.0), align_corners=False)
  config.distill.update(rounds=540, calls_per_round=10, steps_per_round=1000, distill_after=140,
                        batch_size=100, temperature=5.0)
  config.optimizer.update(name='sgd', learning_rate=0.1, momentum=0.9, weight_decay=1e-4,
                          schedule='cosine_by_round', end_value=0.0)
