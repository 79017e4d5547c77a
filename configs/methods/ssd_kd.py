"""SSD-KD on CIFAR. arXiv:2406.07876; no script, code or table of numbers is public.

FastDFKD's numbers (configs/methods/fast_dfkd.py) but for a buffer of 5,000 images, a tenth of CIFAR, and 100 student
steps a round instead of 400, from which the published ratio of times follows roughly. gamma, beta, labels, new
priorities: see `dfkd_jax.synth.methods.ssd_kd` for what is known of each.

Cost: 220 calls of 5 inner steps on 256 images, 20,000 student steps of 256: a quarter of FastDFKD's.
Published: better than Fast-2 on 4 of 5 pairs of CIFAR-10 and by 3.29 points and more on all of CIFAR-100, in 1/1.9 to
1/10 of the time (second hand; which setting of FastDFKD that is, is not clear). If it is Fast-2 of its own paper, then
CIFAR-100, R34-R18, V11-R18, W40-2-W16-1, W40-2-W40-1, W40-2-W16-2, is at least: 73.05 66.12 45.06 56.44 60.37
Command: python main.py --config=configs/cifar10.py:ssd_kd,fast5,wrn40_2-wrn16_1 --workdir=...
  --config.teacher.source=...
"""

from configs.methods import fast_dfkd

VARIANTS = fast_dfkd.VARIANTS
NUMBERS = dict(
    diversity=True, difficulty=True, gamma=2.0, normalised_diversity=False, stop_modulation=False, counted='seen',
    label_source='random', draw='priority', beta=0.5, epsilon=1e-6, clip_weights=10.0, normalise_weights='none',
    new_priority='max')


def apply(config, variant: str):
  """Sets the method's numbers for the teacher that the config names."""
  fast_dfkd.apply(config, variant)
  config.method.update(name='ssd_kd', capacity=5_000, **NUMBERS)
  config.distill.steps_per_round = 100
  return config
