"""A CIFAR-100 teacher: python main.py --config=configs/teacher_cifar100.py:wrn40_2 --workdir=...

Writes WORKDIR/weights.safetensors, which --config.teacher.source takes.
"""

from configs import cifar100, cifar_teachers


def get_config(arguments: str = ''):
  return cifar_teachers.make(
      arguments, dataset='cifar100', num_classes=100, mean=cifar100.MEAN, std=cifar100.STD)
