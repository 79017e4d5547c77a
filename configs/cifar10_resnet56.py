"""A teacher that nobody here trained, at a size for CPUs: python main.py --config=configs/cifar10_resnet56.py
  --config.teacher.source=resnet56.th --workdir=...

The teacher is ResNet-56 of github.com/akamaster/pytorch_resnet_cifar10 (93.39 % on the CIFAR-10 test set, 853,018
parameters): shortcuts without parameters, and the mean and standard deviation of ImageNet. Its file is read as it is.
Arguments: the student, resnet20 (272,474 parameters) or wrn16_1 (175,066), and fast_dfkd or ssd_kd. Cost: an hour on
two cores, a third of it synthesis.

The numbers are ours, for an hour on a CPU where the published recipe takes a GPU: 300 calls of 128 images, of which the
newest 120 are kept; as in configs/default.py latents move faster, classes are asked for equally often, and the
student takes Adam at temperature 4. The factors are the quick start's by the terms' sizes, since the teacher's 55
batch norms make that term ten times as large: with the published ones (10, 0.4, 1.1) the classes asked for go
unheard, cross-entropy 7.7 after 19 calls, and with equal ones it is 0.7. The student begins after 60 calls, when the
images have come some way. No test image was looked at for any of this.
"""

from configs import cifar, cifar10, common

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(arguments: str = ''):
  picked = common.pick(arguments, student=('resnet20', 'wrn16_1'), method=('fast_dfkd', 'ssd_kd'))
  config = common.base()
  config.dataset.update(name='cifar10', num_classes=10)
  config.teacher.update(name='resnet56', options=dict(shortcut='pad'), mean=MEAN, std=STD)
  config.student.update(name=picked['student'], mean=cifar10.MEAN, std=cifar10.STD)
  cifar.apply(config, picked['method'], 'fast5')
  config.method.update(batch_size=128, latent_lr=0.1, adversarial_after=59, reset_after=None)
  if picked['method'] == 'fast_dfkd':
    config.method.capacity = 120 * 128
  config.factors.update(batch_norm=2.0, one_hot=1.0, adversarial=1.0)
  config.labels = 'stratified'
  config.distill.update(rounds=300, distill_after=60, steps_per_round=42, batch_size=64, temperature=4.0)
  config.optimizer.update(
      name='adam', learning_rate=5e-3, weight_decay=0.0, schedule='cosine_by_step', end_value=5e-5, warmup_steps=100)
  config.evaluate.every = 25
  config.checkpoint.every = 50
  return config
