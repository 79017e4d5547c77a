"""Networks, a generator and a task so small that a program of them compiles in seconds."""

import jax
import jax.numpy as jnp

from dfkd_jax import augment, models, synth, tasks

IMAGE = (12, 8, 3)
CLASSES = 5
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def network(seed, widths=(3, 6)):
  """A classifier with drawn running moments: those of `init`, 0 and 1, would hide mistakes."""
  module = models.ConvNet(CLASSES, widths=widths, strides=(1, 2))
  found = models.create_network(module, jax.random.key(seed), IMAGE)
  leaves, tree = jax.tree.flatten(found.batch_stats)
  keys = jax.random.split(jax.random.key(seed + 1000), len(leaves))
  drawn = [jnp.exp(jax.random.normal(key, leaf.shape) / 3) for key, leaf in zip(keys, leaves, strict=True)]
  variables = {'params': found.params, 'batch_stats': jax.tree.unflatten(tree, drawn)}
  return models.bind(module, variables, mean=MEAN, std=STD)


def float64(tree):
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def generator(width=2):
  return models.Generator(image_shape=IMAGE, width=width)


def fast_dfkd(**changes):
  """FastDFKD of three inner steps on four images; `changes` are arguments of the constructor."""
  return synth.create('fast_dfkd', **{
      'generator': generator(), 'image_shape': IMAGE, 'task': tasks.classification(CLASSES),
      'factors': synth.Factors(one_hot=0.5, batch_norm=2.0, adversarial=1.0), 'num_steps': 3, 'latent_dim': 7,
      'batch_size': 4, 'sample_batch_size': 6, 'capacity': 12, 'adversarial_after': 0, 'augment': augment.identity,
      **changes})
