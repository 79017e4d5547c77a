"""CIFAR-100 at the paper's scale: python main.py --config=configs/cifar100.py:nayer --workdir=...

Takes the arguments of configs/cifar10.py; the published scripts change only the data set. The
paper's teachers reach 78.05 (ResNet-34), 71.32 (VGG-11) and 75.83 (WRN-40-2).
configs/teacher_cifar100.py trains yours.
"""

from configs import cifar

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def get_config(arguments: str = ''):
  return cifar.make(arguments, dataset='cifar100', num_classes=100, mean=MEAN, std=STD)
