"""A CIFAR-10 teacher: python main.py --config=configs/teacher_cifar10.py:wrn40_2 --workdir=...

Writes WORKDIR/weights.safetensors, which --config.teacher.source takes.
"""

from configs import cifar10, cifar_teachers


def get_config(arguments: str = ''):
  return cifar_teachers.make(
      arguments, dataset='cifar10', num_classes=10, mean=cifar10.MEAN, std=cifar10.STD)
