"""DAFL. arXiv:1904.01186; configs/online.py has the numbers that it shares.

Cost: 200 rounds of 80 generator steps and 400 student steps on 256 images. The generator's loss
needs no student.
Published (best epoch), R34-R18, V11-R18, W40-2-W16-1, W40-2-W40-1, W40-2-W16-2:
  CIFAR-10 92.22 81.10 65.71 81.33 81.55, CIFAR-100 74.47 54.16 20.88 42.83 43.70
Command: python main.py --config=configs/cifar10.py:dafl,wrn40_2-wrn16_1 --workdir=...
  --config.teacher.source=...
"""

from configs import online


def cifar(config):
  """Sets the published numbers for CIFAR."""
  online.cifar(config, 'dafl', calls=80, latent_dim=512, one_hot=1.0, balance=20.0, activation=1e-3)


def quickstart(config):
  """Sets numbers for the quick start."""
  online.quickstart(config, 'dafl', calls=8, one_hot=1.0, balance=20.0, activation=1e-3)
