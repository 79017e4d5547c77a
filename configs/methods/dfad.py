"""DFAD. arXiv:1912.11006; configs/online.py has the numbers that it shares.

Generator and student use the L1 distance of logits.

Cost: 200 rounds of 80 generator steps and 400 student steps on 256 images.
Published (best epoch) by CuDFKD's authors, ResNet-34 to ResNet-18: CIFAR-10 93.3, CIFAR-100 67.7.
Command: python main.py --config=configs/cifar10.py:dfad,resnet34-resnet18 --workdir=...
  --config.teacher.source=...
"""

from configs import online


def cifar(config):
  """Sets the published numbers for CIFAR."""
  online.cifar(config, 'dfad', calls=80, divergence='l1', adversarial=1.0)


def camvid(config):
  """Sets numbers for CamVid on a CPU."""
  online.camvid(config, 'dfad', adversarial=1.0)
  config.method.adversary = dict(divergence='log_l1', temperature=1.0, masked=False)
  config.distill.divergence = 'l1'


def dense(config):
  """Sets the published numbers for segmentation, see configs/dense.py."""
  schedule = config.optimizer
  config.method.update(
      generator_lr=1e-3, generator_schedule='steps', generator_milestones=schedule.milestones,
      generator_gamma=schedule.gamma, adam_b1=0.9, adam_b2=0.999)
  config.method.adversary.train_mode = True
  config.distill.update(temperature=1.0, divergence='l1')


def quickstart(config):
  """Sets numbers for the quick start."""
  online.quickstart(config, 'dfad', calls=2, adversarial=1.0)
  config.method.generator_schedule = 'cosine'
  config.distill.divergence = 'l1'
