"""DAFL on CIFAR. arXiv:1904.01186; see configs/methods/online.py for what it shares.

Cost: 200 rounds of 80 generator steps and 400 student steps on 256 images; no student in the generator's loss.
Published (best epoch), CIFAR-10 / CIFAR-100, R34-R18, V11-R18, W40-2-W16-1, W40-2-W40-1, W40-2-W16-2:
  92.22 81.10 65.71 81.33 81.55 / 74.47 54.16 20.88 42.83 43.70
Command: python main.py --config=configs/cifar10.py:dafl,wrn40_2-wrn16_1 --workdir=... --config.teacher.source=...
"""

from configs.methods import online


def apply(config):
  """Sets the method's numbers."""
  return online.apply(config, 'dafl', calls=80, latent_dim=512, one_hot=1.0, balance=20.0, activation=1e-3)
