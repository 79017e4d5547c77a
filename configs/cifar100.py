"""CIFAR-100 at the paper's scale: python main.py --config=configs/cifar100.py:fast_dfkd --workdir=...

Arguments as in configs/cifar10.py; the published scripts change only the data set. Teachers of the paper: 78.05
(ResNet-34), 71.32 (VGG-11), 75.83 (WRN-40-2); train yours by configs/teacher_cifar100.py.
"""

from configs import cifar

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def get_config(arguments: str = ''):
  return cifar.make(arguments, dataset='cifar100', num_classes=100, mean=MEAN, std=STD)
