"""Adaptive DeepInversion. arXiv:1912.08795; for CIFAR the numbers of the published scripts.

Cost: 200 calls of 1,000 steps on 256 images (the papers' tables have 2,000), 80,000 student steps
of 256.
Published (best epoch, 2,000 steps), R34-R18, V11-R18, W40-2-W16-1, W40-2-W40-1, W40-2-W16-2:
  CIFAR-10 93.26 90.36 83.04 86.85 89.72, CIFAR-100 61.32 54.13 53.77 61.33 61.34
Command: python main.py --config=configs/cifar10.py:deep_inversion,wrn40_2-wrn16_1 --workdir=...
  --config.teacher.source=...
"""


def cifar(config):
  """Sets the published numbers; that code keeps the last iterate: --config.method.keep=last."""
  config.method.update(
      name='deep_inversion', num_steps=1000, learning_rate=0.1, adam_b1=0.5, adam_b2=0.99,
      keep='best', adversarial_after=0, batch_size=256, capacity=200 * 256, num_tasks=1,
      task_map='auto', adversary=dict(divergence='js', temperature=3.0, masked=False))
  config.factors.update(batch_norm=10.0, one_hot=1.0, adversarial=1.0, total_variation=1e-3)
  config.augment.synthesis.name = 'roll_and_flip'
  config.distill.update(
      rounds=200, steps_per_round=400, distill_after=0, batch_size=256, temperature=20.0)
  config.optimizer.update(name='sgd', learning_rate=0.1, momentum=0.9, weight_decay=1e-4,
                          schedule='cosine_by_round', end_value=2e-4)


def quickstart(config):
  """Sets numbers for the quick start."""
  config.method.update(
      name='deep_inversion', num_steps=100, learning_rate=0.1, keep='best', adversarial_after=2,
      batch_size=128, capacity=12_800, num_tasks=1,
      adversary=dict(divergence='js', temperature=3.0, masked=False))
  config.factors.update(batch_norm=10.0, one_hot=1.0, adversarial=3.0, total_variation=1e-3)
  config.augment.synthesis.update(name='roll_and_flip', pad=None)
  config.distill.update(rounds=40, steps_per_round=240, distill_after=2)
  config.evaluate.every = 5
  config.checkpoint.every = 4
