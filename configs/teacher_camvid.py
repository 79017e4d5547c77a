"""DFAD's teacher for CamVid: python main.py --config=configs/teacher_camvid.py --workdir=...

DeepLabv3 over ResNet-50 with 11 classes: SGD 0.1, batch 16, 200 epochs, times 0.1 at 100, focal
loss with an exponent of 2, crops of 128 (arXiv:1912.11006 and its code). Published: mIoU 0.594.
The published teacher has dropout of 0.5 in its head and begins from a ResNet-50 of ImageNet. Both
are left out here, so less is to be expected. The argument `validate` evaluates on the split val.
"""

from configs import common, dense


def get_config(arguments: str = ''):
  picked = common.pick(arguments, split=('test', 'validate'))
  config = common.base()
  config.update(job='train', task='segmentation')
  config.dataset.update(
      name='camvid', image_shape=(256, 341, 3), num_classes=11, ignore=11, resize=True)
  if picked['split'] == 'validate':
    config.dataset.test_split = 'val'
  config.teacher.update(name='deeplabv3_resnet50', options=dict(rates=dense.DFAD_RATES),
                        mean=dense.HALF, std=dense.HALF)
  config.augment.student.update(name='random_crop_and_flip', size=(128, 128))
  config.train.update(network='teacher', epochs=200, batch_size=16, focal_gamma=2.0)
  config.optimizer.update(name='sgd', learning_rate=0.1, momentum=0.9, weight_decay=5e-4,
                          schedule='steps', milestones=(100,), gamma=0.1)
  config.evaluate.update(every=10, batch_size=8)
  return config
