"""A public teacher at a size for CPUs: python main.py --config=configs/cifar10_resnet56.py
  --config.teacher.source=resnet56.th --workdir=...

The teacher is ResNet-56 of github.com/akamaster/pytorch_resnet_cifar10: 93.39 % on the CIFAR-10
test set, 853,018 parameters, shortcuts without parameters, and ImageNet's mean and standard
deviation. Its file is read unchanged. Arguments: the student, resnet20 (272,474 parameters) or
wrn16_1 (175,066), and fast_dfkd or ssd_kd. Cost: an hour on two cores, a third of it synthesis.

The numbers are ours, for an hour on a CPU where the published recipe takes a GPU. There are 300
calls of 128 images, and the newest 120 calls are kept. As in configs/default.py latents move
faster, classes are requested equally often, and the student takes Adam at temperature 4.

The factors are the quick start's, scaled by the terms' sizes: this teacher has 55 batch norms,
which makes their term ten times as large. With the published factors (10, 0.4, 1.1) images ignore
the requested classes: cross-entropy is 7.7 after 19 calls, and 0.7 with equal factors. The student
starts after 60 calls, when images have improved. No test image was used to choose any number.
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
  config.distill.update(
      rounds=300, distill_after=60, steps_per_round=42, batch_size=64, temperature=4.0)
  config.optimizer.update(name='adam', learning_rate=5e-3, weight_decay=0.0,
                          schedule='cosine_by_step', end_value=5e-5, warmup_steps=100)
  config.evaluate.every = 25
  config.checkpoint.every = 50
  return config
