"""A teacher that nobody here trained, at a size for CPUs: python main.py --config=configs/cifar10_resnet56.py
  --config.teacher.source=resnet56.th --workdir=...

The teacher is ResNet-56 of github.com/akamaster/pytorch_resnet_cifar10 (93.39 % on the CIFAR-10 test set, 853,018
parameters): shortcuts without parameters, and the mean and standard deviation of ImageNet. Its file is read as it is.
Argument: the student, resnet20 (272,474 parameters) or wrn16_1 (175,066). FastDFKD as in configs/methods/fast_dfkd.py,
Fast-5 for a WRN, with smaller batches and fewer steps.
"""

from configs import cifar, cifar10, common

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(arguments: str = ''):
  picked = common.pick(arguments, student=('resnet20', 'wrn16_1'), method=tuple(cifar.METHODS))
  config = common.base()
  config.dataset.update(name='cifar10', num_classes=10)
  config.teacher.update(name='resnet56', options=dict(shortcut='pad'), mean=MEAN, std=STD)
  config.student.update(name=picked['student'], mean=cifar10.MEAN, std=cifar10.STD)
  cifar.METHODS[picked['method']].apply(config, 'fast5')
  config.method.update(batch_size=128, capacity=220 * 128)
  config.distill.update(batch_size=128, steps_per_round=50)
  config.evaluate.every = 10
  return config
