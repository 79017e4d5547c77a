"""SSD-KD on CIFAR. arXiv:2406.07876; no script, code or table of numbers is public.

FastDFKD's numbers (configs/methods/fast_dfkd.py) but for a buffer of 5,000 images, a tenth of CIFAR, and 100 student
steps a round instead of 400, from which the published ratio of times follows roughly. gamma, beta, labels, new
priorities: see `dfkd_jax.synth.methods.ssd_kd` for what is known of each.

Cost: 220 calls of 5 inner steps on 256 images, 20,000 student steps of 256: a quarter of FastDFKD's.
Published: better than Fast-2 on 4 of 5 pairs of CIFAR-10 and on all of CIFAR-100, in 1/1.9 to 1/10 of the time (second
hand; which setting of FastDFKD that is, is not clear).
Command: python main.py --config=configs/cifar10.py:ssd_kd,fast5,wrn40_2-wrn16_1 --workdir=...
  --config.teacher.source=...
"""

from configs.methods import fast_dfkd

VARIANTS = fast_dfkd.VARIANTS


def apply(config, variant: str):
  """Sets the method's numbers for the teacher that the config names."""
  fast_dfkd.apply(config, variant)
  config.method.update(
      name='ssd_kd', capacity=5_000, diversity=True, difficulty=True, gamma=2.0, beta=0.5, draw='priority',
      label_source='random', new_priority='max')
  config.distill.steps_per_round = 100
  return config
