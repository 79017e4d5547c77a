"""A small CMI and its terms by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import toys

from dfkd_jax import augment, synth, tasks
from dfkd_jax.synth import Factors

CONTRAST = Factors(one_hot=0.5, batch_norm=2.0, adversarial=1.0, contrast=0.8)


def cmi(**changes):
  """Two inner steps on four images, a bank of nine rows of which up to five are drawn."""
  return synth.create('cmi', **{
      'generator': toys.generator(), 'image_shape': toys.IMAGE,
      'task': tasks.classification(toys.CLASSES), 'factors': CONTRAST, 'num_steps': 2,
      'latent_dim': 7, 'batch_size': 4, 'sample_batch_size': 6, 'capacity': 12,
      'bank_size': 9, 'num_negatives': 5, 'projection_size': 6, 'augment': augment.identity,
      'local_view': augment.flip, **changes})


def no_rows(key, size, capacity, number):
  """Inversions that do not depend on the bank."""
  del key, size, capacity
  return jnp.arange(number), jnp.zeros(number, bool)


def projected(head, features):
  hidden = np.maximum(features @ head['head_0']['kernel'] + head['head_0']['bias'], 0)
  found = hidden @ head['head_2']['kernel'] + head['head_2']['bias']
  return found / np.linalg.norm(found, axis=-1, keepdims=True)


def features_of(images):
  pooled = toys.jit(toys.teacher())(images).pooled
  return np.concatenate([pooled['bn1'], pooled['bn2']], axis=-1)


def count(state):
  return optax.tree_utils.tree_get(state.head_opt_state, 'count')
