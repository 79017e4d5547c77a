r"""Segmentation of rooms: DeepLabv3 over ResNet-50 into DeepLabv3 over MobileNetV2, 13 classes.

  python main.py --config=configs/nyuv2.py:dfad --config.teacher.source=WEIGHTS --workdir=...

To prepare the test images (PNG labels of 1 to 13, with 0 for no label):
  python -m dfkd_jax.prepare folder --name nyuv2 --split test --source image/test \
    --masks seg13/test --first_label 1 --data_dir=...
Argument: the method. DFAD's numbers are published (configs/dense.py); FastDFKD's, SSD-KD's and
CuDFKD's for segmentation are not, and are ours.

Published mIoU: teacher 0.517, student with the training images 0.380, with related images 0.396,
DFAD 0.364 (reproduced by a user: 0.32), DAFL 0.105 (arXiv:1912.11006, table 3); FastDFKD with ten
steps 0.366, SSD-KD 0.384 (second hand). The best of 300 tests.
"""

from configs import common, dense

METHODS = common.methods('camvid')


def get_config(arguments: str = ''):
  picked = common.pick(arguments, method=tuple(METHODS))
  config = common.base()
  config.task = 'segmentation'
  config.dataset.update(
      name='nyuv2', image_shape=(256, 341, 3), num_classes=13, ignore=255, resize=True)
  return dense.published(config, picked['method'], weight_decay=5e-5, gamma=0.3)
