"""DFQ on CIFAR. arXiv:2005.04136; see configs/methods/online.py for what it shares.

Cost: 200 rounds of 40 generator steps and 400 student steps on 256 images.
Published (best epoch), CIFAR-10 / CIFAR-100, R34-R18, V11-R18, W40-2-W16-1, W40-2-W40-1, W40-2-W16-2:
  94.61 90.84 86.14 91.69 92.01 / 77.01 66.21 51.27 54.43 64.79
Command: python main.py --config=configs/cifar10.py:dfq,wrn40_2-wrn16_1 --workdir=... --config.teacher.source=...
"""

from configs.methods import online


def apply(config):
  """Sets the method's numbers, with the student's rate of the one script for CIFAR-100 that differs."""
  online.apply(config, 'dfq', calls=40, batch_norm=1.0, one_hot=1.0, balance=20.0, adversarial=1.0)
  if config.dataset.num_classes == 100 and config.teacher.name == 'resnet34':
    config.optimizer.learning_rate = 0.05
  return config
