"""DFQ. arXiv:2005.04136; configs/online.py has the numbers that it shares.

Cost: 200 rounds of 40 generator steps and 400 student steps on 256 images.
Published (best epoch), R34-R18, V11-R18, W40-2-W16-1, W40-2-W40-1, W40-2-W16-2:
  CIFAR-10 94.61 90.84 86.14 91.69 92.01, CIFAR-100 77.01 66.21 51.27 54.43 64.79
Command: python main.py --config=configs/cifar10.py:dfq,wrn40_2-wrn16_1 --workdir=...
  --config.teacher.source=...
"""

from configs import online


def cifar(config):
  """Sets the published numbers for CIFAR; one script for CIFAR-100 has another student's rate."""
  online.cifar(config, 'dfq', calls=40, batch_norm=1.0, one_hot=1.0, balance=20.0, adversarial=1.0)
  if config.dataset.num_classes == 100 and config.teacher.name == 'resnet34':
    config.optimizer.learning_rate = 0.05


def quickstart(config):
  """Sets numbers for the quick start."""
  online.quickstart(
      config, 'dfq', calls=4, batch_norm=10.0, one_hot=1.0, balance=20.0, adversarial=1.0)
