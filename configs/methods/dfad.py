"""DFAD on CIFAR. arXiv:1912.11006; see configs/methods/online.py for what it shares.

Generator and student go by the L1 distance of logits.

Cost: 200 rounds of 80 generator steps and 400 student steps on 256 images.
Published (best epoch) by CuDFKD's authors, ResNet-34 to ResNet-18: CIFAR-10 93.3, CIFAR-100 67.7.
Command: python main.py --config=configs/cifar10.py:dfad,resnet34-resnet18 --workdir=... --config.teacher.source=...
"""

from configs.methods import online


def apply(config):
  """Sets the method's numbers."""
  return online.apply(config, 'dfad', calls=80, divergence='l1', adversarial=1.0)
