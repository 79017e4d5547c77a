"""Training of CIFAR teachers.

Users of the published script (SGD 0.1, decay 1e-4, steps) report 92.0 for WRN-40-2, but the tables
have 94.87. So weight decay is 5e-4 here, with Nesterov momentum and a cosine to 0, the usual recipe
for these networks.
"""

from configs import common


def make(arguments: str, *, dataset: str, num_classes: int, mean: tuple, std: tuple):
  """Makes the config of a network: wrn40_2, resnet34 or vgg11."""
  picked = common.pick(arguments, network=('wrn40_2', 'resnet34', 'vgg11'))
  config = common.base()
  config.job = 'train'
  config.dataset.update(name=dataset, num_classes=num_classes)
  config.teacher.update(name=picked['network'], mean=mean, std=std)
  config.train.update(network='teacher', epochs=200, batch_size=128)
  config.optimizer.update(name='sgd', learning_rate=0.1, momentum=0.9, nesterov=True,
                          weight_decay=5e-4, schedule='cosine_by_step')
  return config
