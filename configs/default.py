"""The embedded quick start, what `python main.py` runs: FastDFKD on Fashion-MNIST, two CPU cores, minutes.

The teacher (dfkd_jax/assets/teachers) was trained by configs/teacher_fashion_mnist.py; the student has less than a
quarter of its parameters. The same networks, schedule and numbers for any method: --config=configs/default.py:METHOD.
"""

from configs import common, teacher_fashion_mnist

METHODS = ('fast_dfkd',)


def get_config(arguments: str = ''):
  """METHOD, and `smoke` for a run of about a minute."""
  picked = common.pick(arguments, method=METHODS, length=('full', 'smoke'))
  config = common.base()
  config.dataset.update(name='fashion_mnist', image_shape=(28, 28, 1), num_classes=10)
  normalisation = dict(mean=teacher_fashion_mnist.MEAN, std=teacher_fashion_mnist.STD)
  strides = teacher_fashion_mnist.STRIDES
  config.teacher.update(
      name='convnet', options=dict(widths=teacher_fashion_mnist.WIDTHS, strides=strides),
      source='embedded:fashion_mnist_convnet', **normalisation)
  config.student.update(
      name='convnet', options=dict(widths=(8, 16, 16, 32, 32), strides=strides), **normalisation)
  config.generator.update(name='generator', options=dict(width=16))
  config.method.update(
      name=picked['method'], num_steps=5, generator_lr=3e-3, latent_lr=0.1, latent_dim=64, meta='fomaml',
      moments_momentum=0.9, adversarial_after=9, batch_size=128, capacity=12_800, num_tasks=1)
  config.factors.update(batch_norm=10.0, one_hot=1.0, adversarial=1.0)
  config.augment.synthesis.update(name='shift', pad=2)
  config.augment.student.update(name='shift', pad=2)
  config.distill.update(rounds=260, steps_per_round=25, distill_after=10, batch_size=128, temperature=4.0)
  config.optimizer.update(
      name='adam', learning_rate=2e-3, weight_decay=0.0, schedule='cosine_by_step', end_value=2e-5, warmup_steps=50)
  config.evaluate.update(every=20, batch_size=1000)
  config.checkpoint.every = 50
  config.control = True
  if picked['length'] == 'smoke':
    config.distill.rounds = 80
    config.control = False
  return config
