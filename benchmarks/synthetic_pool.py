"""Data, teacher, pool of images, students and training steps of `spline_heads`."""

import functools
import math
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dfkd_jax import data, distill, models, spline, synth, tasks, weights  # noqa: E402
from dfkd_jax.losses import divergence  # noqa: E402
from dfkd_jax.synth import replay  # noqa: E402

CLASSES, BATCH, WARMUP = 10, 64, 10
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Case(NamedTuple):
  """Numbers of a data set."""

  shape: tuple[int, int, int]
  mean: float
  std: float
  strides: tuple[int, ...]  # Of convnets.
  epochs: int  # Of the teacher.
  calls: int  # Of the method, 128 images each.
  width: int  # Of heads.
  fit_images: int
  warm_epochs: int
  steps: int


CASES = {
    'digits': Case((8, 8, 1), 0.305, 0.376, (1, 1, 2, 1, 2), 40, 40, 64, 4000, 4, 500),
    'fashion_mnist': Case(
        (28, 28, 1), 0.2860, 0.3530, (2, 1, 2, 1, 1), 10, 80, 256, 8000, 4, 2000)}
QUICK = dict(epochs=1, calls=2, width=24, fit_images=150, warm_epochs=1, steps=6)


def load(name, data_dir):
  """Images uint8 [N, H, W, C] and labels [N]: to train the teacher on, and to test on."""
  if name == 'digits':
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.uint8(255 * images / 16).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(images))
    return [(images[rows], labels[rows]) for rows in (order[:1200], order[1200:])]
  return [data.load(name, split, data_dir, image_shape=CASES[name].shape)[:2]
          for split in ('train', 'test')]


def optimizer(rate, num_steps=math.inf, mask=None):
  """Adam with a short warm-up; the rate falls to 0 as a cosine if `num_steps` is given."""
  def schedule(step):
    return rate * jnp.minimum(1, (step + 1) / WARMUP) * (1 + jnp.cos(jnp.pi * step / num_steps)) / 2

  return optax.chain(optax.adam(schedule), *([] if mask is None else [spline.mask_updates(mask)]))


@functools.partial(jax.jit, static_argnames=('loss', 'batch_size'))
def train(student, first, last, key, inputs, targets, rate, num_steps, mask, *, loss, batch_size):
  """Steps from `first` to `last` on inputs [N, ...]; the batch of a step depends on the key."""
  def step(index, student):
    rows = jax.random.randint(jax.random.fold_in(key, index), (batch_size,), 0, len(inputs))
    batch = inputs[rows]
    batch = replay.to_float(batch) if batch.dtype == jnp.uint8 else batch
    loss_fn = lambda outputs: (loss(outputs.logits, targets[rows]).mean(), None)
    return distill.train_step(student, batch, loss_fn, optimizer(rate, num_steps, mask))[0]

  return lax.fori_loop(first, last, step, student)


@jax.jit
def _apply(network, inputs):
  outputs = network(replay.to_float(inputs) if inputs.dtype == jnp.uint8 else inputs)
  return outputs.logits, outputs.features


def apply(network, inputs):
  """Logits [N, K] and features [N, D] or None."""
  parts = [_apply(network, inputs[i:i + 1000]) for i in range(0, len(inputs), 1000)]
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def scores(network, inputs, targets, labels=None):
  """Divergence from the teacher's logits, and the accuracy if there are labels."""
  logits = apply(network, inputs)[0]
  accuracy = None if labels is None else float((logits.argmax(1) == labels).mean())
  return float(divergence.kl(logits, targets).mean()), accuracy


def make_teacher(case, kind, images, labels, path):
  options = {'mean': (case.mean,), 'std': (case.std,)}
  module = models.ImageNetVGG(CLASSES, groups=((16,), (32,)), hidden=128) if kind == 'stack' else (
      models.ConvNet(CLASSES, widths=(16, 32, 48, 64, 80), strides=case.strides))
  if not path.exists():
    network, steps = models.create_network(module, jax.random.key(0), case.shape, **options), (
        case.epochs * len(images) // 128)
    learner = distill.init(network, optimizer(2e-3))
    network = train(
        learner, 0, steps, jax.random.key(1), jnp.asarray(images), jnp.asarray(labels), 2e-3,
        float(steps), None, loss=cross_entropy, batch_size=128).network
    weights.save_safetensors(
        path, {'params': network.params, 'batch_stats': network.batch_stats})
  return models.bind(module, weights.load(path, module, case.shape), **options)


def make_pool(case, teacher, path):
  """Synthesises images uint8 [N, H, W, C] by FastDFKD, without a student."""
  if not path.exists():
    method = synth.create(
        'fast_dfkd', generator=models.Generator(image_shape=case.shape, width=16),
        image_shape=case.shape, task=tasks.classification(CLASSES),
        factors=synth.Factors(batch_norm=10.0, one_hot=1.0), num_steps=20, generator_lr=3e-3,
        latent_lr=0.1, latent_dim=64, batch_size=128, sample_batch_size=128,
        capacity=128 * case.calls, augment=lambda key, images: images)
    state, call = method.init(jax.random.key(2), teacher), jax.jit(method.synthesize)
    for index in range(case.calls):
      state, _ = call(state, jax.random.fold_in(jax.random.key(3), index), teacher, None)
    np.savez(path, images=np.asarray(replay.find_buffer(state).images[0]))
  return np.load(path)['images']


def make_sets(teacher, pool, test, labels):
  """Splits the pool; returns images, logits of the teacher and labels, if any, by set."""
  order, count = np.random.default_rng(0).permutation(len(pool)), len(pool) // 8
  images = {'pool': pool[order[count:]], 'held out': pool[order[:count]], 'test': test}
  sets = {name: (jnp.asarray(rows), jnp.asarray(apply(teacher, rows)[0]), None)
          for name, rows in images.items()}
  return sets | {'test': (*sets['test'][:2], np.asarray(labels))}


class Start(NamedTuple):
  """Where all arms of a seed begin."""

  student: models.Network
  features: dict[str, np.ndarray]  # [N, D] of each set of images.
  key: jax.Array


def make_start(case, seed, sets, path):
  """Trains a student on the pool for a few epochs; all its arms begin there."""
  keys = jax.random.split(jax.random.key(100 + seed), 3)
  module = models.ConvNet(
      CLASSES, widths=(12, 16, 24, 32, 32), strides=case.strides, head_width=case.width)
  student = models.create_network(
      module, keys[0], case.shape, mean=(case.mean,), std=(case.std,))
  images, logits = sets['pool'][:2]
  steps = case.warm_epochs * len(images) // BATCH
  student = train(
      distill.init(student, optimizer(3e-3)), 0, steps, keys[1], images, logits, 3e-3, math.inf,
      None, loss=divergence.kl, batch_size=BATCH).network
  weights.save_safetensors(path, {'params': student.params, 'batch_stats': student.batch_stats})
  features = {name: apply(student, rest[0])[1] for name, rest in sets.items()}
  return Start(student, features, keys[2])
