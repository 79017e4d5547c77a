"""DFAD's protocol of segmentation, which the configs of CamVid and NYUv2 share.

DFAD (arXiv:1912.11006) and FastDFKD (arXiv:2112.06253) distil DeepLabv3 over ResNet-50 into
DeepLabv3 over MobileNetV2. Only DFAD's code for it is public. Its protocol: images of 128x128
pixels, 300 rounds of 50 times 5 student steps and 1 generator step of 64 images, mean and standard
deviation of 0.5; test images whole, with a short side of 256. Left out here: dropout of 0.5 in both
heads, and the moves of the student's running moments in generator steps. FastDFKD's, SSD-KD's and
CuDFKD's numbers for segmentation are not public; these are ours. Numbers of one method alone are in
its file in configs/methods, by a function `dense`.
"""

from configs import common

HALF = (0.5,)
DFAD_RATES = (12, 24, 32)


def published(config, method: str, *, weight_decay: float, gamma: float):
  """Sets the networks and numbers of DFAD's protocol; other methods get as many student steps."""
  config.task = 'segmentation'
  config.teacher.update(
      name='deeplabv3_resnet50', options=dict(rates=DFAD_RATES), mean=HALF, std=HALF)
  config.student.update(
      name='deeplabv3_mobilenet', mean=HALF, std=HALF,
      options=dict(rates=DFAD_RATES, plan='dfad', stem_padding=1))
  config.generator.update(name='dfad_generator', image_shape=(128, 128, 3))
  config.augment.student.name = 'none'
  config.distill.update(rounds=300, calls_per_round=50, steps_per_round=250, distill_after=0,
                        batch_size=64)
  config.optimizer.update(name='sgd', learning_rate=0.1, momentum=0.9, weight_decay=weight_decay,
                          schedule='steps', milestones=(100, 200), gamma=gamma)
  config.evaluate.batch_size = 8
  config.grid.update(columns=5, rows=6)
  common.methods('camvid')[method].camvid(config)
  config.method.update(batch_size=64, latent_dim=256)
  config.distill.update(calls_per_round=50 if config.method.num_steps == 1 else 1, distill_after=0,
                        temperature=2.0, divergence='kl')
  own = common.methods('dense')
  if method in own:
    own[method].dense(config)
  return config
