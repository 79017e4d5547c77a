"""The embedded teacher: python main.py --config=configs/teacher_fashion_mnist.py --workdir=...

Needs the training images:
  python -m dfkd_jax.prepare fashion_mnist --source=FOLDER_OF_IDX_FILES --data_dir=...
The argument `validate` trains on the first 55,000 training images and evaluates on the other 5,000.
The settings were chosen that way, never on the test images.
"""

from configs import common

MEAN, STD = (0.2860,), (0.3530,)
WIDTHS, STRIDES = (16, 32, 48, 64, 80), (2, 1, 2, 1, 1)


def get_config(arguments: str = ''):
  picked = common.pick(arguments, split=('test', 'validate'))
  config = common.base()
  config.job = 'train'
  config.dataset.update(name='fashion_mnist', image_shape=(28, 28, 1), num_classes=10)
  if picked['split'] == 'validate':
    config.dataset.update(train_split='train[:55000]', test_split='train[55000:]')
  config.teacher.update(
      name='convnet', options=dict(widths=WIDTHS, strides=STRIDES), mean=MEAN, std=STD)
  config.augment.student.update(name='crop_and_flip', pad=2)
  config.train.update(network='teacher', epochs=20, batch_size=128)
  config.optimizer.update(name='sgd', learning_rate=0.1, momentum=0.9, nesterov=True,
                          weight_decay=5e-4, schedule='cosine_by_step', warmup_steps=400)
  return config
