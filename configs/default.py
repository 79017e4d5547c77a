"""The embedded quick start: FastDFKD on Fashion-MNIST in minutes on two CPU cores. python main.py

configs/teacher_fashion_mnist.py trained the teacher (dfkd_jax/assets/teachers). The student has
less than a quarter of its parameters. Arguments: the method, and `smoke` for a run of about a
minute. The numbers are ours, for this size; docs/results.md says how they were chosen.
"""

from configs import common, teacher_fashion_mnist

METHODS = common.methods('quickstart')


def get_config(arguments: str = ''):
  """Makes the config of a METHOD; `smoke` makes it short."""
  picked = common.pick(arguments, method=tuple(METHODS), length=('full', 'smoke'))
  config = common.base()
  config.dataset.update(name='fashion_mnist', image_shape=(28, 28, 1), num_classes=10)
  normalisation = dict(mean=teacher_fashion_mnist.MEAN, std=teacher_fashion_mnist.STD)
  strides = teacher_fashion_mnist.STRIDES
  config.teacher.update(
      name='convnet', options=dict(widths=teacher_fashion_mnist.WIDTHS, strides=strides),
      source='embedded:fashion_mnist_convnet', **normalisation)
  config.student.update(
      name='convnet', options=dict(widths=(12, 16, 24, 32, 32), strides=strides), **normalisation)
  config.generator.update(name='generator', options=dict(width=16))
  config.augment.synthesis.update(name='shift', pad=2)
  config.augment.student.update(name='shift', pad=2)
  config.labels = 'stratified'  # the teacher's classes in the buffer stay balanced
  config.distill.update(
      rounds=250, steps_per_round=40, distill_after=10, batch_size=64, temperature=4.0)
  config.optimizer.update(name='adam', learning_rate=8e-3, weight_decay=0.0,
                          schedule='cosine_by_step', end_value=8e-5, warmup_steps=50)
  config.evaluate.update(every=25, batch_size=1000)
  config.checkpoint.every = 20
  METHODS[picked['method']].quickstart(config)
  if picked['length'] == 'smoke':
    config.distill.rounds //= 4
  return config
