"""NAYER. arXiv:2310.00258; for CIFAR the numbers of its published command line for CIFAR-100.

An epoch is a round of two calls, each a batch of 400 images from its own noisy layers, and 400
student steps of 512: 200 after each call, where the published program takes all after the second.
The first 20 published epochs have ten calls and no student step. Here they are 100 rounds of two
calls, so a generator lives a fifth as long as published.
--config.method.embeddings=FILE gives embeddings [classes, E]: a .npy file, or one array in a file
of safetensors or PyTorch. Published are CLIP's (ViT-B/32) of "a image of CLASS". The default is
one-hot, which holds no knowledge beyond the teacher's.

Cost: 400 calls of 40 inner steps (30 for CIFAR-10) on 400 images, 40,000 student steps of 512.
Published with CLIP's embeddings, CIFAR-100, W40-2-W16-2: about 70.2 for 100 epochs, as here, read
off a figure; 71.72 for 300 (--config.distill.rounds=400 --config.method.capacity=320000). For 300,
R34-R18, V11-R18, W40-2-W16-1 and W40-2-W40-1, from memory and not verified: 77.54 71.75 62.23 71.7
Command: python main.py --config=configs/cifar100.py:nayer,wrn40_2-wrn16_2 --workdir=...
  --config.teacher.source=...
"""

from ml_collections import config_dict

from configs import common
from configs.methods import fast_dfkd

WARMUP, ROUNDS, CALLS = 100, 100, 2


def cifar(config):
  """Sets the published numbers for CIFAR."""
  config.method.update(
      name='nayer', num_steps=30 if config.dataset.num_classes == 10 else 40, generator_lr=4e-3,
      latent_lr=4e-3, latent_dim=1_000, adam_b1=0.5, adam_b2=0.999, meta='reinit',
      redraw_every=10 * CALLS, embeddings=config_dict.placeholder(str), moments_momentum=0.9,
      adversarial_after=WARMUP * CALLS, keep='best', batch_size=400,
      capacity=(WARMUP + ROUNDS) * CALLS * 400, num_tasks=1, task_map='auto', **common.averaged())
  config.generator.update(name='generator', options=dict(width=64))
  config.labels = 'stratified'  # the method does so in any case
  config.factors.update(batch_norm=10.0, one_hot=0.5, adversarial=1.33)
  config.distill.update(rounds=WARMUP + ROUNDS, calls_per_round=CALLS, steps_per_round=400,
                        distill_after=WARMUP, batch_size=512, temperature=20.0)
  config.optimizer.update(name='sgd', learning_rate=0.2, momentum=0.9, weight_decay=1e-4,
                          schedule='cosine_by_round', end_value=2e-4)


def quickstart(config):
  """Sets numbers for the quick start."""
  fast_dfkd.quickstart(config)
  config.method.update(
      name='nayer', num_steps=40, latent_lr=3e-3, meta='reinit', redraw_every=20,
      adversarial_after=10, embeddings=config_dict.placeholder(str))
  config.distill.update(rounds=60, steps_per_round=240)
  config.evaluate.every = 5
  config.checkpoint.every = 4
