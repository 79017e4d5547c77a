"""NAYER on CIFAR. arXiv:2310.00258; the numbers are those of its published command line for CIFAR-100.

An epoch is a round of two calls, each a batch of 400 images from noisy layers of its own, and 400 student steps of 512:
200 after each call, where the published program takes all after the second. The first 20 epochs have ten calls and
no student step; here that is 100 rounds of two, in which a generator therefore lives a fifth as long as published.
Embeddings come by --config.method.embeddings=FILE (.npy, or one array in .safetensors or a file of PyTorch's; [classes,
E]), published: CLIP's (ViT-B/32) of "a image of CLASS". Without they are one-hot, and nothing but the teacher is known.

Cost: 400 calls of 40 inner steps (30 for CIFAR-10) on 400 images, 40,000 student steps of 512.
Published with embeddings by CLIP, CIFAR-100, W40-2-W16-2: about 70.2 for 100 epochs, as here, read off a figure; 71.72
for 300 (--config.distill.rounds=400 --config.method.capacity=320000). For 300, R34-R18, V11-R18, W40-2-W16-1 and
W40-2-W40-1, as they are remembered and not verified: 77.54 71.75 62.23 71.7
Command: python main.py --config=configs/cifar100.py:nayer,wrn40_2-wrn16_2 --workdir=... --config.teacher.source=...
"""

from ml_collections import config_dict

from configs import common

WARMUP, ROUNDS, CALLS = 100, 100, 2


def apply(config):
  """Sets the method's numbers."""
  config.method.update(
      name='nayer', num_steps=30 if config.dataset.num_classes == 10 else 40, generator_lr=4e-3, latent_lr=4e-3,
      latent_dim=1_000, adam_b1=0.5, adam_b2=0.999, meta='reinit', redraw_every=10 * CALLS,
      embeddings=config_dict.placeholder(str), moments_momentum=0.9, adversarial_after=WARMUP * CALLS, keep='best',
      batch_size=400, capacity=(WARMUP + ROUNDS) * CALLS * 400, num_tasks=1, task_map='auto', **common.averaged())
  config.generator.update(name='generator', options=dict(width=64))
  config.labels = 'stratified'  # As the method asks, whatever stands here.
  config.factors.update(batch_norm=10.0, one_hot=0.5, adversarial=1.33)
  config.distill.update(
      rounds=WARMUP + ROUNDS, calls_per_round=CALLS, steps_per_round=400, distill_after=WARMUP, batch_size=512,
      temperature=20.0)
  config.optimizer.update(
      name='sgd', learning_rate=0.2, momentum=0.9, weight_decay=1e-4, schedule='cosine_by_round', end_value=2e-4)
  return config
