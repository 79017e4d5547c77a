r"""Segmentation of street scenes, from a public ESPNet, for two CPU cores:

  python main.py --config=configs/camvid.py:fast_dfkd \
    --config.teacher.source=espnet_p2_q8_camvid.pth --workdir=runs/camvid

The teacher is ESPNet (p 2, q 8, 354,517 parameters) of github.com/sacmehta/ESPNet: 12 outputs, of
which void is the last. Its file is read unchanged. It scores a mean IoU of 0.569 on the test
images, or 0.554 with void counted. The student is a small dilated residual network of 89,448
parameters. The data set `camvid` is only for the evaluation:
  python -m dfkd_jax.prepare folder --name camvid --split test --source CamVid/test \
    --masks CamVid/testannot --data_dir=...
Arguments: the method; `scratch`, which trains the student on the training images instead (prepare
them as the split train); `published`, DFAD's protocol with DeepLabv3 (configs/dense.py). Its
teacher is from configs/teacher_camvid.py.

Published (arXiv:1912.11006, table 3, mIoU of 11 classes, the best of 300 tests): teacher 0.594,
student with the training images 0.535, DFAD 0.535, DAFL 0.010. The numbers for a CPU are ours. No
test image was used to choose them. A round takes some 15 s on one core. Expect half the teacher's
mean IoU after an hour, and little more later: 0.32 of 0.65 on 40 validation images, one seed.
"""

from configs import common, dense

MEAN, STD = (0.41189, 0.42513, 0.43267), (69.904, 72.691, 72.126)  # ESPNet's own, in RGB order
VOID = 11
METHODS = common.methods('camvid')


def get_config(arguments: str = ''):
  picked = common.pick(arguments, method=(*METHODS, 'scratch'), size=('cpu', 'published'))
  config, method = common.base(), picked['method']
  config.task = 'segmentation'
  config.dataset.update(name='camvid', ignore=VOID)
  if (method, picked['size']) == ('scratch', 'published'):
    raise ValueError("Config arguments 'scratch' and 'published' exclude each other.")
  if picked['size'] == 'published':
    config.dataset.update(image_shape=(256, 341, 3), num_classes=11, resize=True)
    return dense.published(config, method, weight_decay=5e-4, gamma=0.1)
  config.dataset.update(image_shape=(360, 480, 3), num_classes=12)
  config.teacher.update(name='espnet', mean=MEAN, std=STD, bgr=True)
  config.student.update(name='drn', mean=MEAN, std=tuple(round(std / 255, 5) for std in STD))
  config.evaluate.update(every=25, batch_size=8)
  config.grid.update(columns=4, rows=6)
  config.checkpoint.every = 25
  if method == 'scratch':
    return _scratch(config)
  config.generator.update(name='generator', image_shape=(96, 128, 3), options=dict(width=32))
  config.augment.synthesis.name = config.augment.student.name = 'flip'
  config.distill.update(rounds=400, steps_per_round=40, distill_after=10, batch_size=16, mosaic=2,
                        temperature=2.0)
  config.optimizer.update(name='adam', learning_rate=3e-3, weight_decay=0.0,
                          schedule='cosine_by_step', end_value=3e-5, warmup_steps=100)
  METHODS[method].camvid(config)
  return config


def _scratch(config):
  """Trains the student on crops of the 367 training images, as a row to compare with."""
  config.job = 'train'
  config.augment.student.update(name='random_crop_and_flip', size=(192, 256))
  config.train.update(epochs=200, batch_size=8, class_weights='median_frequency')
  config.optimizer.update(name='adam', learning_rate=2e-3, weight_decay=1e-4,
                          schedule='cosine_by_step', end_value=2e-5, warmup_steps=100)
  return config
