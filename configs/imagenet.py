r"""FastDFKD on ImageNet, with a published teacher:

  python main.py --config=configs/imagenet.py --config.teacher.source=hf:timm/resnet50.tv_in1k \
    --workdir=runs/imagenet
  python main.py --config=configs/imagenet.py --config.teacher.source=resnet50.safetensors \
    --config.job=check

The second command only measures the teacher. Arguments: a pair TEACHER-STUDENT of TEACHERS and
STUDENTS below, and a size.

  full     224x224 pixels and the numbers of the published logs (configs/methods/fast_dfkd.py)
  px128    images of 128x128 pixels, a third of the cost; the networks take that size
  small    px128 in bfloat16 with maps recomputed in the backward pass, a generator with a cheap
           last stage, half the batch and the newest 100,000 images: for a device of 8 to 16 GB
  cpu      a demonstration for two CPU cores: a quarter of an hour of synthesis, a few student steps

With judge-TEACHER and --config.judge.source, a second network classifies the images too.

Published (arXiv:2112.06253, table 3, torchvision ResNet-50, validation top-1, the best epoch): to
ResNet-50 68.61, to ResNet-18 53.45, to MobileNetV2 43.02 %. Cost (R50-R18, full): by the layers'
formulas 40.4 GFLOP an image and inner step, 19.1 an image and student step, 1.9 EFLOP in all. The
540,000 images take 81 GB, in host memory if a device has no room. Each checkpoint is as large, and
the host needs it twice while one is written. So there is a checkpoint every 60 rounds, and one is
kept.

Without real images the student is evaluated by its agreement with the teacher on fresh synthetic
images. With a prepared data set, --config.dataset.name=imagenet2012 gives its top-1.

Keras' own ResNet-50 (layers named conv2_block1_1_conv) needs
--config.teacher.options.epsilon=1.001e-5.

The factor of the moments term is tuned to torchvision's ResNet-50, the published teacher. Other
teachers get relative_batch_norm, which needs no tuning to the scale of a network. The preflight
compares the terms for any teacher.
"""

from ml_collections import config_dict

from configs import common
from configs.methods import fast_dfkd

_TORCHVISION = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_TENSORFLOW = dict(mean=(127 / 255,), std=(128 / 255,))
_CAFFE = dict(mean=(123.68 / 255, 116.779 / 255, 103.939 / 255), std=(1 / 255,), bgr=True)
TEACHERS = {  # model, and the preprocessing of its published weights
    'resnet50': ('resnet50_imagenet', _TORCHVISION),
    'resnet34': ('resnet34_imagenet', _TORCHVISION),
    'resnet50_keras': ('resnet50_keras', _CAFFE | dict(options=dict(epsilon=1e-3))),  # of its files
    'efficientnet_lite0': ('efficientnet_lite0', _TENSORFLOW),
    'vgg16_bn': ('vgg16_bn', _TORCHVISION),
}
STUDENTS = {'resnet18': 'resnet18_imagenet', 'resnet50': 'resnet50_imagenet',
            'mobilenetv2': 'mobilenetv2_imagenet'}
PAIRS = tuple(f'{teacher}-{student}' for teacher in TEACHERS for student in STUDENTS)
JUDGES = tuple(f'judge-{teacher}' for teacher in TEACHERS)
SIZES = ('full', 'px128', 'small', 'cpu')
_ADVERSARIAL = {'resnet18': 1.0}  # by student; 0.1 for all others, as logged


def get_config(arguments: str = ''):
  """Makes the config of a PAIR, a SIZE and a JUDGE, in any order."""
  picked = common.pick(arguments, pair=PAIRS, size=SIZES, judge=(None, *JUDGES))
  teacher, student = picked['pair'].split('-')
  config = common.base()
  config.dataset.update(
      image_shape=(224, 224, 3), num_classes=1000, test_split='validation', crop=0.875)
  config.teacher.update(name=TEACHERS[teacher][0], **TEACHERS[teacher][1])
  if picked['judge']:
    name, expected = TEACHERS[picked['judge'].removeprefix('judge-')]
    config.judge.update(name=name, **expected)
  config.student.update(name=STUDENTS[student], **_TORCHVISION)
  fast_dfkd.imagenet(config, _ADVERSARIAL.get(student, 0.1))
  if teacher != 'resnet50':
    config.factors.update(batch_norm=0.0, relative_batch_norm=1.0, one_hot=1.0)
  config.evaluate.update(every=10, batch_size=100)
  config.checkpoint.update(every=60, max_to_keep=1)
  if picked['size'] != 'full':
    config.dataset.image_shape = (128, 128, 3)
  if picked['size'] == 'small':
    _small(config)
  if picked['size'] == 'cpu':
    _cpu(config)
  return config


def _small(config):
  config.update(compute_dtype='bfloat16', remat=True)
  config.generator.options = dict(widths=(128, 128, 64, 64, 64), last='subpixel')
  config.method.update(batch_size=50, capacity=100_000)
  config.distill.batch_size = 50


def _cpu(config):
  """Sets our numbers for few calls: fresh, fast latents, and the moments of each batch alone."""
  config.generator.options = dict(widths=(64, 64, 32, 32, 32), last='subpixel')
  config.method.update(
      num_steps=40, generator_lr=3e-3, latent_lr=0.1, meta='fomaml',
      meta_lr=config_dict.placeholder(float), carry_latents=False,
      restart_every=config_dict.placeholder(int), keep='best', moments_momentum=0.0,
      adversarial_after=10, batch_size=32, capacity=1_280)
  config.factors.adversarial = 0.0  # a student of so few steps is no adversary
  config.distill.update(
      rounds=40, calls_per_round=1, steps_per_round=5, distill_after=10, batch_size=32)
  config.preflight.batch_size = 8
  config.checkpoint.every = 10
