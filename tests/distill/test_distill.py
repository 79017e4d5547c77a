"""The student's half of a round: the published code's numbers, and a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from conftest import golden
from flax import linen as nn
from flax import struct, traverse_util

from dfkd_jax import augment, distill, models, synth, weights
from dfkd_jax.distill import mosaic
from dfkd_jax.losses import divergence
from dfkd_jax.types import Batch


def assert_close(tree, other, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, other)


def wide_resnet(name):
  module = models.create('wrn16_1', 10)
  return models.bind(module, weights.to_variables(golden(name), module, (32, 32, 3)))


def torch_layout(network):
  return weights.from_variables({'params': network.params, 'batch_stats': network.batch_stats})


def samples_of(name, batch):
  """Values per channel before each batch norm of a WRN-16 on 32x32 pixels."""
  if name.startswith('block1') or name.startswith('block2.layer.0.bn1'):
    return batch * 32 * 32
  return batch * (
      16 * 16 if name.startswith('block2') or name.startswith('block3.layer.0.bn1') else 8 * 8)


def test_two_steps_of_sgd_as_published(x64):
  """Corrects running variances: PyTorch uses a batch's unbiased one, n / (n - 1) times Flax's."""
  archive = golden('kd_step')
  if 'x' not in archive:
    pytest.skip('The reference steps are not at hand, only the learning rates.')
  teacher, student = (
      toys.float64(wide_resnet(name)) for name in ('teacher_wrn16_1', 'student_wrn16_1'))
  tx = distill.coupled_sgd(0.2, momentum=0.9, weight_decay=1e-4)

  @jax.jit
  def step(student, images):
    targets = teacher(images).logits
    loss_fn = lambda outputs: (divergence.kl(outputs.logits, targets, 20.0).mean(), outputs.logits)
    return (targets, *distill.train_step(student, images, loss_fn, tx))

  state = distill.init(student, tx)
  expected = torch_layout(student)
  for index in (1, 2):
    before = torch_layout(state.network)
    # Normalised already.
    images = jnp.asarray(archive['x'][index - 1].transpose(0, 2, 3, 1), jnp.float64)
    targets, state, loss, logits = step(state, images)
    np.testing.assert_allclose(loss, archive[f'step{index}/loss_f64'], rtol=1e-9)
    np.testing.assert_allclose(targets, archive[f'step{index}/t_out_f64'], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(logits, archive[f'step{index}/s_out_f64'], rtol=1e-9, atol=1e-9)
    arrays = torch_layout(state.network)
    for name, value in arrays.items():
      if name.endswith('num_batches_tracked'):
        continue
      if name.endswith('running_var'):
        n = samples_of(name, len(images))
        expected[name] = 0.9 * expected[name] + n / (n - 1) * (value - 0.9 * before[name])
        value = expected[name]
      np.testing.assert_allclose(
          value, archive[f'step{index}/after_f64/{name}'], rtol=1e-6, atol=1e-7,
          err_msg=f'{name} after {index}')
  assert step._cache_size() == 1


def test_learning_rates_as_published():
  """20 epochs without the student, then a cosine over 200 to 2e-4, constant within 400 steps."""
  rates = golden('kd_step')['lr_per_epoch_lr0.2_warmup20_epochs220'][20:]
  schedule = distill.cosine_by_round(0.2, rounds=200, steps_per_round=400, end_value=2e-4)
  steps = 400 * jnp.arange(200)
  np.testing.assert_allclose(jax.vmap(schedule)(steps), rates, rtol=2e-5)
  np.testing.assert_allclose(jax.vmap(schedule)(steps + 399), rates, rtol=2e-5)


def test_learning_rate_by_hand():
  schedule = distill.cosine_by_round(1.0, rounds=4, steps_per_round=3)
  # It stays at the end.
  by_hand = np.repeat((1 + np.cos(np.pi * np.array([0, 1, 2, 3, 4, 4]) / 4)) / 2, 3)
  np.testing.assert_allclose([schedule(step) for step in range(18)], by_hand, atol=1e-6)


def test_weight_decay_is_coupled():
  """By hand: g + wd p goes through momentum; decoupled decay would leave the trace alone."""
  tx = distill.coupled_sgd(0.5, momentum=0.9, weight_decay=0.1)
  p, trace = np.array([1.0, -2.0]), np.zeros(2)
  params, state = jnp.asarray(p), tx.init(jnp.asarray(p))
  for grad in (np.array([0.3, 0.0]), np.array([-0.1, 0.2])):
    updates, state = tx.update(jnp.asarray(grad), state, params)
    params = optax.apply_updates(params, updates)
    trace = 0.9 * trace + grad + 0.1 * p
    p = p - 0.5 * trace
    np.testing.assert_allclose(params, p, rtol=1e-6)


class Count(struct.PyTreeNode):
  calls: jax.Array  # of weigh


IMAGES = np.random.default_rng(0).uniform(size=(20, *toys.IMAGE)).astype(np.float32)


def fixed(weights):
  """A method with twenty images: `weigh` counts its calls, `weights` maps losses to [6]."""
  def sample(state, key):
    slots = jax.random.randint(key, (6,), 0, 20)
    return Batch(jnp.asarray(IMAGES)[slots], slots, slots)

  def weigh(state, batch, losses):
    assert losses.shape == batch.labels.shape == (6,)
    return state.replace(calls=state.calls + 1), weights(losses)

  return synth.Synthesizer(lambda *_: Count(jnp.int32(0)), lambda *_: None, sample, weigh)


def run(synthesizer, tx, seed=0, rounds=1, **changes):
  """Rounds of three steps in one program: student, state and metrics after the last."""
  student = distill.init(toys.student(), tx)
  state = synthesizer.init(jax.random.key(0), toys.teacher())
  program = toys.jit(lambda *inputs: distill.distill(
      *inputs, synthesizer=synthesizer, tx=tx,
      **{'num_steps': 3, 'temperature': 4.0, 'augment': augment.identity, **changes}))
  for index in range(rounds):
    student, state, metrics = program(student, state, jax.random.key(seed + index), toys.teacher())
  assert program._cache_size() == 1
  return student, state, metrics


def test_a_round_equals_a_plain_loop():
  tx = optax.sgd(1e-3)  # At larger rates rounding grows from step to step.
  synthesizer = fixed(lambda losses: jnp.arange(1.0, 7.0))
  trained, state, metrics = run(synthesizer, tx, augment=augment.flip)

  @toys.jit
  def step(params, batch_stats, images):
    targets = toys.teacher()(images).logits

    def loss_fn(params):
      network = toys.student().replace(params=params, batch_stats=batch_stats)
      outputs, new = network.forward(images, train=True)
      p, log_q = jax.nn.softmax(targets / 4), jax.nn.log_softmax(outputs.logits / 4)
      per_sample = 16 * (p * (jnp.log(p) - log_q)).sum(1)
      same = (outputs.logits.argmax(1) == targets.argmax(1)).mean()
      return (jnp.arange(1.0, 7.0) * per_sample).sum() / 6, (new, same)

    (loss, (new, same)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), new, loss, same

  params, batch_stats = toys.student().params, toys.student().batch_stats
  losses, agreements = [], []
  for step_key in jax.random.split(jax.random.key(0), 3):
    key_sample, key_augment = jax.random.split(step_key)
    images = synthesizer.sample(state, key_sample).images
    images = augment.flip(jax.random.fold_in(key_augment, 0), images)
    params, batch_stats, loss, same = step(params, batch_stats, images)
    losses.append(loss)
    agreements.append(same)
  assert_close(trained.network.params, params, rtol=1e-4, atol=1e-5)
  assert_close(trained.network.batch_stats, batch_stats, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(metrics['loss'], np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(metrics['agreement'], np.mean(agreements), rtol=1e-6)
  np.testing.assert_allclose(metrics['weight'], 3.5, rtol=1e-6)
  np.testing.assert_allclose(metrics['weighed_loss'], np.mean(losses) / 3.5, rtol=1e-5)
  assert (int(trained.step), int(state.calls)) == (3, 3)


def test_samples_of_weight_zero_teach_nothing():
  trained, _, metrics = run(fixed(jnp.zeros_like), optax.sgd(0.1))
  assert_close(trained.network.params, toys.student().params, rtol=0)
  assert [float(metrics[name]) for name in ('loss', 'weight', 'weighed_loss')] == [0, 0, 0]
  # The batch norms still see the images.
  moved = jax.tree.map(
      lambda a, b: np.abs(a - b).max(), trained.network.batch_stats, toys.student().batch_stats)
  assert min(jax.tree.leaves(moved)) > 1e-4


def test_no_gradient_flows_through_the_weights():
  """Weights of 1 / loss would make the product constant, and the student learn nothing."""
  trained, _, metrics = run(fixed(lambda losses: 1 / losses), optax.sgd(0.1), num_steps=1)
  np.testing.assert_allclose(metrics['loss'], 1, rtol=1e-5)
  moved = jax.tree.map(
      lambda a, b: np.abs(a - b).max(), trained.network.params, toys.student().params)
  assert max(jax.tree.leaves(moved)) > 1e-4


def test_the_student_comes_closer_round_by_round():
  tx = distill.coupled_sgd(1e-4, momentum=0.9, weight_decay=0.0)
  losses = [float(run(fixed(jnp.ones_like), tx, rounds=rounds)[2]['loss']) for rounds in (1, 8)]
  assert losses[1] < 0.5 * losses[0]


def test_state_and_student_may_be_donated():
  synthesizer, tx = fixed(jnp.ones_like), optax.sgd(0.1, momentum=0.9)
  student = jax.tree.map(jnp.copy, distill.init(toys.student(), tx))
  state = synthesizer.init(jax.random.key(0), toys.teacher())
  program = toys.jit(lambda *inputs: distill.distill(
      *inputs, synthesizer=synthesizer, tx=tx, num_steps=2, augment=augment.identity),
      donate_argnums=(0, 1))
  after, _, _ = program(student, state, jax.random.key(1), toys.teacher())
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(student.network.params))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, toys.teacher())))
  assert jax.tree.structure(after) == jax.tree.structure(student)


@pytest.mark.parametrize(('kind', 'expected'), [
    ('l1', lambda s, t: np.abs(s - t).mean(-1)),
    ('l2', lambda s, t: ((s - t) ** 2).mean(-1)),
    ('kl', lambda s, t: np.asarray(divergence.kl(s, t, 3.0)))])
def test_divergence_is_one_number_a_sample(kind, expected):
  s, t = (
      np.random.default_rng(seed).normal(size=(4, 3, 2, 5)).astype(np.float32) for seed in (0, 1))
  dense = distill.divergence(kind, jnp.asarray(s), jnp.asarray(t), 3.0)
  np.testing.assert_allclose(dense, expected(s, t).reshape(4, -1).mean(1), rtol=1e-5)
  plain = distill.divergence(kind, jnp.asarray(s[:, 0, 0]), jnp.asarray(t[:, 0, 0]), 3.0)
  np.testing.assert_allclose(plain, expected(s[:, 0, 0], t[:, 0, 0]), rtol=1e-5)


def test_an_unknown_divergence_is_named():
  with pytest.raises(ValueError, match=r"divergence is 'js', must be one of \('kl', 'l1', 'l2'\)"):
    distill.divergence('js', jnp.zeros((2, 3)), jnp.zeros((2, 3)), 1.0)


def test_all_parameters_take_part_in_a_step():
  """Batch norms' scales and biases decay too, as published."""
  tx = distill.coupled_sgd(0.1, momentum=0.0, weight_decay=0.5)
  trained, _, _ = run(fixed(jnp.zeros_like), tx, num_steps=1)
  for path, leaf in traverse_util.flatten_dict(trained.network.params).items():
    before = traverse_util.flatten_dict(toys.student().params)[path]
    np.testing.assert_allclose(leaf, 0.95 * before, rtol=1e-5, err_msg='/'.join(path))


class Pixels(nn.Module):
  """A batch norm and a class for each pixel, from a neighbourhood of `size`."""

  size: int

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(x)
    self.sow('intermediates', 'stage_1', x)
    return nn.Conv(3, (self.size, self.size))(x)


@pytest.mark.parametrize(('size', 'differs'), [(1, False), (3, True)])
def test_mosaics_give_pixels_more_around_them(size, differs):
  """Where a pixel sees no other, mosaics of four change nothing; weights stay those of images."""
  module, tx = Pixels(size), optax.sgd(0.1)
  teacher, student = (models.create_network(module, jax.random.key(seed), (6, 8, 2))
                      for seed in (1, 2))
  images = jax.random.uniform(jax.random.key(3), (8, 6, 8, 2))
  weights = jnp.arange(8.0)
  sample = lambda state, key: Batch(images, jnp.zeros(8, int), jnp.zeros(8, int))
  seen = []

  def weigh(state, batch, losses):
    seen.append(losses.shape)
    return state, weights

  method = synth.Synthesizer(lambda *_: (), lambda *_: None, sample, weigh)
  trained, loss = [], []
  for side in (1, 2):
    result = toys.jit(lambda key, side=side: distill.distill(
        distill.init(student, tx), (), key, teacher, synthesizer=method, tx=tx, num_steps=2,
        augment=augment.identity, mosaic_side=side, attention_factor=0.5))(jax.random.key(0))
    trained.append(result[0].network.params)
    loss.append(float(result[2]['loss']))
  assert set(seen) == {(8,)}
  distance = max(toys.distances(*trained).values())
  assert distance > 1e-3 if differs else distance < 1e-5
  assert (abs(loss[0] - loss[1]) > 1e-3 * loss[0]) == differs


def test_a_mosaic_has_its_images_row_by_row():
  images = np.arange(8 * 2 * 3).reshape(8, 2, 3, 1)
  joined = mosaic.join(jnp.asarray(images), 2)
  assert joined.shape == (2, 4, 6, 1)
  np.testing.assert_array_equal(joined[1, :2, 3:], images[5])
  np.testing.assert_array_equal(joined[0, 2:, :3], images[2])
  np.testing.assert_array_equal(mosaic.split(joined, 2), images)
