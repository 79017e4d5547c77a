"""SSD-KD. arXiv:2406.07876; no script, code or table of numbers is public.

The numbers for CIFAR are FastDFKD's (configs/methods/fast_dfkd.py), except for two. The buffer
holds 5,000 images, a tenth of CIFAR. A round has 100 student steps instead of 400, which roughly
gives the published ratio of times. `dfkd_jax.synth.methods.ssd_kd` tells the sources of gamma,
beta, labels and new priorities.

Cost: 220 calls of 5 inner steps on 256 images, 20,000 student steps of 256: a quarter of
FastDFKD's.
Published: better than Fast-2 on 4 of 5 pairs of CIFAR-10, and by at least 3.29 points on all of
CIFAR-100, in 1/1.9 to 1/10 of the time (second hand; the setting of FastDFKD is not clear). If it
is Fast-2 of FastDFKD's paper, CIFAR-100, R34-R18, V11-R18, W40-2-W16-1, W40-2-W40-1, W40-2-W16-2,
is at least: 73.05 66.12 45.06 56.44 60.37
Command: python main.py --config=configs/cifar10.py:ssd_kd,fast5,wrn40_2-wrn16_1 --workdir=...
  --config.teacher.source=...
"""

from configs.methods import fast_dfkd

VARIANTS = fast_dfkd.VARIANTS
NUMBERS = dict(
    diversity=True, difficulty=True, gamma=2.0, normalised_diversity=False, stop_modulation=False,
    counted='seen', label_source='random', draw='priority', beta=0.5, epsilon=1e-6,
    clip_weights=10.0, normalise_weights='none', new_priority='max')


def cifar(config, variant: str):
  """Sets FastDFKD's numbers of a variant, and the method's own."""
  fast_dfkd.cifar(config, variant)
  config.method.update(name='ssd_kd', capacity=5_000, **NUMBERS)
  config.distill.steps_per_round = 100


def camvid(config):
  """Sets numbers for CamVid on a CPU."""
  fast_dfkd.camvid(config)
  config.factors.adversarial = 1.0
  config.method.update(name='ssd_kd', capacity=4_000, **NUMBERS | dict(label_source='argmax'))


def dense(config):
  """Sets numbers for DFAD's protocol of segmentation, see configs/dense.py."""
  config.method.capacity = 16_000


def quickstart(config):
  """Sets numbers for the quick start."""
  fast_dfkd.quickstart(config)
  config.method.update(name='ssd_kd', capacity=5_000, **NUMBERS)
