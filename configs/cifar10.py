"""CIFAR-10 at the paper's scale: python main.py --config=configs/cifar10.py:fast_dfkd --workdir=...

Arguments, in any order: a method such as fast_dfkd (or scratch, kd), a pair such as
wrn40_2-wrn16_1, and for FastDFKD and SSD-KD fast2, fast5 or fast10. configs/methods/METHOD.py has
the cost and the published results. The paper's teachers reach 95.70 (ResNet-34), 92.25 (VGG-11) and
94.87 (WRN-40-2). configs/teacher_cifar10.py trains yours; --config.teacher.source=WEIGHTS names it.
"""

from configs import cifar

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def get_config(arguments: str = ''):
  return cifar.make(arguments, dataset='cifar10', num_classes=10, mean=MEAN, std=STD)
