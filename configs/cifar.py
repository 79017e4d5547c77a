"""What CIFAR-10 and CIFAR-100 share: the published pairs, and the baselines on real data."""

from configs import common
from configs.methods import fast_dfkd

METHODS = common.methods('cifar')
PAIRS = ('wrn40_2-wrn16_1', 'resnet34-resnet18', 'vgg11-resnet18', 'wrn40_2-wrn40_1',
         'wrn40_2-wrn16_2')


def make(arguments: str, *, dataset: str, num_classes: int, mean: tuple, std: tuple):
  """Makes a config from a METHOD, scratch or kd, a PAIR and a variant of FastDFKD or SSD-KD."""
  picked = common.pick(arguments, job=(*METHODS, 'scratch', 'kd'), pair=PAIRS,
                       variant=(None, *fast_dfkd.VARIANTS))
  method, variant = picked['job'], picked['variant']
  config = common.base()
  config.dataset.update(name=dataset, num_classes=num_classes)
  config.teacher.name, config.student.name = picked['pair'].split('-')
  for network in (config.teacher, config.student):
    network.update(mean=mean, std=std)
  if variant and not hasattr(METHODS.get(method), 'VARIANTS'):
    raise ValueError(
        f'Config argument {variant!r} is for FastDFKD and SSD-KD, not for {method!r}.')
  if method in METHODS:
    apply(config, method, variant)
  else:
    supervised(config, kd=method == 'kd')
  return config


def apply(config, method: str, variant: str | None):
  """Sets the numbers of a method, and of a variant if it has any; None: the first variant."""
  module = METHODS[method]
  variants = getattr(module, 'VARIANTS', None)
  module.cifar(config, *([variant or next(iter(variants))] if variants else []))


def supervised(config, *, kd: bool):
  """Sets the published baselines on real data: the student from scratch, or by KD with labels.

  Scratch: SGD 0.1, batch 256, times 0.2 at epochs 120, 150, 180 of 200. KD: batch 128, temperature
  1, KL times 1 plus cross-entropy times 0.1, times 0.1 at the same epochs.
  """
  config.job = 'train'
  config.train.update(network='student', epochs=200, batch_size=256)
  config.optimizer.update(name='sgd', learning_rate=0.1, momentum=0.9, weight_decay=1e-4,
                          schedule='steps', milestones=(120, 150, 180), gamma=0.2)
  if kd:
    config.train.update(batch_size=128, label_factor=0.1, teacher_factor=1.0, temperature=1.0)
    config.optimizer.gamma = 0.1
