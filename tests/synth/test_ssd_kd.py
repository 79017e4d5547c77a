"""SSD-KD: what it adds to FastDFKD, and that nothing is left of it where that is switched off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from dfkd_jax import augment, distill, parallel, synth, tasks
from dfkd_jax.losses import divergence
from dfkd_jax.synth import priorities as priority
from dfkd_jax.synth import replay

NUM = 4
BARE = dict(diversity=False, difficulty=False, draw='uniform')


def ssd_kd(**changes):
  """With the numbers of `toys.fast_dfkd`."""
  return synth.create('ssd_kd', **{
      'generator': toys.generator(), 'image_shape': toys.IMAGE,
      'task': tasks.classification(toys.CLASSES),
      'factors': synth.Factors(one_hot=0.5, batch_norm=2.0, adversarial=1.0), 'num_steps': 3,
      'latent_dim': 7, 'batch_size': 4, 'sample_batch_size': 6, 'capacity': 12,
      'adversarial_after': 0, 'augment': augment.identity, **changes})


def assert_equal(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_close(tree, other, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, other)


def rounds(method, num, dtype=None):
  """States after each call, metrics, batches, weights; the adversary sets in at the third call."""
  cast = toys.float64 if dtype else lambda tree: tree
  networks = cast(toys.teacher()), cast(toys.student())
  state = toys.jit(method.init)(jax.random.key(0), networks[0])
  synthesize, sample = toys.jit(method.synthesize), toys.jit(method.sample)
  found = []
  for index in range(num):
    state, metrics = synthesize(state, jax.random.key(10 + index), *networks)
    batch = sample(state, jax.random.key(20 + index))
    state, weights = method.weigh(state, batch, jnp.linspace(0.5, 3.0, 6))
    found.append((state, metrics, batch, weights))
  return found


@functools.cache
def fast_dfkd():
  return rounds(toys.fast_dfkd(capacity=10, adversarial_after=2), 4)


def test_without_its_additions_it_is_fast_dfkd():
  """Number for number over four calls, in which the ring goes round and the adversary sets in."""
  found, expected = rounds(ssd_kd(capacity=10, adversarial_after=2, **BARE), 4), fast_dfkd()
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  assert_equal(found, expected)
  last = expected[-1][0]
  assert (int(last.step), int(last.buffer.size), int(last.buffer.next)) == (4, 10, 6)


def test_with_draws_by_priority_and_beta_0_only_the_draws_differ():
  changes = dict(diversity=False, difficulty=False, beta=0.0, capacity=10, adversarial_after=2)
  found, expected = rounds(ssd_kd(**changes), 4), fast_dfkd()
  drawn = []
  for (state, metrics, batch, weights), (other, other_metrics, other_batch, _) in zip(
      found, expected, strict=True):
    assert_equal(weights, np.ones(6))
    assert_equal(metrics, other_metrics)
    assert_equal(state.buffer.weights, np.ones((1, 10)))
    assert_equal(state.replace(buffer=state.buffer.replace(priorities=None, weights=None)), other)
    drawn.append(np.array_equal(batch.slots, other_batch.slots))
  assert not all(drawn)


def test_a_modulation_of_1_is_none(x64):
  """No gradient flows through it either; in float64, as the order of sums differs by program."""
  changes = dict(diversity=False, draw='uniform', num_steps=2)
  found = rounds(ssd_kd(gamma=0.0, **changes), 2, jnp.float64)
  expected = rounds(ssd_kd(difficulty=False, **changes), 2, jnp.float64)
  assert_close(found, expected, rtol=1e-9, atol=1e-11)


def on_devices(size, begin, networks):
  """Two rounds of everything on so many devices, with all that is on offer switched on."""
  mesh, spread, one = parallel.make_mesh(size), parallel.specs(begin), parallel.REPLICATED

  def step(state, key, teacher, student, *, axis):
    method = everything(size, axis)
    key_synthesize, *keys = jax.random.split(key, 4)
    state, metrics = method.synthesize(state, key_synthesize, teacher, student)
    for key_sample in keys:
      batch = method.sample(state, key_sample)
      losses = jnp.exp(40 * batch.images.astype(jnp.float64).mean((1, 2, 3)) - 20)
      state, weights = method.weigh(state, batch, losses)
    return state, metrics, (batch.images, batch.labels, weights)

  program = toys.jit(parallel.each_device(
      step, mesh, (spread, one, one, one), (spread, one, parallel.SPREAD)))
  state, networks = parallel.place(mesh, begin), parallel.place(mesh, networks)
  for index in range(2):
    state, *rest = program(state, jax.random.key(30 + index), *networks)
  return state, rest


def everything(size, axis):
  return ssd_kd(
      num_steps=2, num_tasks=NUM // size, capacity=20 // size, sample_batch_size=16 // size,
      task_map='map', axis=axis, augment=augment.flip, gamma=0.5, new_priority='modulation',
      normalise_weights='max')


def test_four_devices_equal_one(x64):
  """Synthesis modulated by the common histogram, draws, weights; stripes lie in their places."""
  networks = toys.float64(toys.teacher()), toys.float64(toys.student())
  begin = toys.jit(everything(1, None).init)(jax.random.key(0), networks[0])
  (one, rest_of_one), (four, rest_of_four) = (
      on_devices(size, begin, networks) for size in (1, NUM))
  for name in ('images', 'labels', 'priorities', 'weights'):
    leaf = getattr(four.buffer, name)
    assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [1] * NUM
  assert four.buffer.histogram.is_fully_replicated
  one, four, rest_of_one, rest_of_four = jax.device_get((one, four, rest_of_one, rest_of_four))
  images, other = (state.buffer.images.astype(int) for state in (four, one))
  assert np.abs(images - other).max() <= 1
  blank = lambda state: state.replace(buffer=state.buffer.replace(images=()))
  assert_close(blank(four), blank(one), rtol=1e-7, atol=1e-10)
  assert_close(rest_of_four, rest_of_one, rtol=1e-6, atol=1e-10)
  assert int(one.buffer.histogram.sum()) == 20
  assert (one.buffer.histogram > 0).sum() >= 2
  weights = rest_of_one[1][2]
  assert abs(weights.max() - 1) < 1e-12
  assert weights.min() < 0.9


def test_states_say_how_they_are_spread():
  state = jax.eval_shape(everything(1, None).init, jax.random.key(0), toys.teacher())
  specs = parallel.specs(state)
  for name, spec in (('images', parallel.SPREAD), ('priorities', parallel.SPREAD),
                     ('weights', parallel.SPREAD), ('histogram', parallel.REPLICATED),
                     ('size', parallel.REPLICATED)):
    assert getattr(specs.buffer, name) == spec
  uniform = parallel.specs(jax.eval_shape(ssd_kd(**BARE).init, jax.random.key(0), toys.teacher()))
  assert (uniform.buffer.priorities, uniform.buffer.weights) == (None, None)


def of_two_stripes(new_priority):
  return ssd_kd(
      num_steps=1, num_tasks=2, capacity=14, new_priority=new_priority, gamma=0.5,
      factors=synth.Factors(one_hot=1.0))


@functools.cache
def two_stripes():
  """Three images in each, with highest priorities of 3 and 5."""
  state = toys.jit(of_two_stripes('max').init)(jax.random.key(0), toys.teacher())
  return state.replace(buffer=state.buffer.replace(
      priorities=jnp.array([[3.0, 1, 2, 9, 9, 9, 9], [4.0, 5, 0, 9, 9, 9, 9]]),
      weights=2 * jnp.ones((2, 7)), size=jnp.int32(3), next=jnp.int32(3),
      histogram=jnp.array([3, 0, 0, 0, 3])))


@pytest.mark.parametrize('new_priority', ['max', 'one', 'modulation'])
def test_the_priority_of_new_images(new_priority):
  synthesize = toys.jit(of_two_stripes(new_priority).synthesize)
  state, _ = synthesize(two_stripes(), jax.random.key(1), toys.teacher(), None)
  found = np.asarray(priority.live_priorities(state.buffer))
  np.testing.assert_array_equal(found[:, :3], two_stripes().buffer.priorities[:, :3])
  np.testing.assert_array_equal(state.buffer.weights, [[2, 2, 2, 1, 1, 1, 1]] * 2)
  new = found[:, 3:] if new_priority == 'one' else found[:, 3:] / [[3], [5]]
  if new_priority == 'modulation':  # By image, in [0, 1].
    assert len(np.unique(new)) == 8
    assert ((new > 0) & (new <= 1)).all()
  else:
    np.testing.assert_array_equal(new, np.ones((2, 4)))


@functools.cache
def toy_run():
  """Two rounds: method, student, states after synthesis and distillation, metrics, programs."""
  method = ssd_kd(generator=toys.package_generator(), num_steps=2, capacity=16, sample_batch_size=4)
  tx = optax.sgd(1e-4)
  synthesize = toys.jit(method.synthesize)
  train = toys.jit(functools.partial(
      distill.distill, synthesizer=method, tx=tx, num_steps=24, temperature=4.0,
      augment=augment.identity))
  # Its answers are far enough from the teacher's, and unlike from image to image.
  apart = lambda leaf: leaf * (1 + 0.3 * jnp.cos(jnp.arange(leaf.size))).reshape(leaf.shape)
  network = toys.teacher().replace(params=jax.tree.map(apart, toys.teacher().params))
  student = distill.init(network, tx)
  state = toys.jit(method.init)(jax.random.key(0), toys.teacher())
  states, metrics = [], []
  for index in range(4):
    state, _ = synthesize(state, jax.random.key(10 + index), toys.teacher(), student.network)
    if index >= 2:
      states.append(state)
      student, state, found = train(student, state, jax.random.key(20 + index), toys.teacher())
      metrics.append(found)
      states.append(state)
  return method, student, states, metrics, (synthesize, train)


def test_each_program_of_a_run_is_compiled_once():
  *_, metrics, programs = toy_run()
  assert [program._cache_size() for program in programs] == [1, 1]
  assert all(np.isfinite(found['loss']) for found in metrics)


def test_distillation_moves_the_priorities_of_what_it_draws():
  """Twelve are live after the third call, and 96 draws leave hardly any out; the rest stays."""
  *_, states, _, _ = toy_run()
  for before, after, live in (*states[:2], 12), (*states[2:], 16):
    priorities, weights = (
        np.asarray(after.buffer.priorities[0]), np.asarray(after.buffer.weights[0]))
    changed = priorities != np.asarray(before.buffer.priorities[0])
    assert changed[:live].sum() >= live - 1
    assert not changed[live:].any()
    assert (priorities[changed] > 0).all()
    assert (weights[changed] != 1).all()
    assert (weights[priorities < 0] == 1).all()
    assert_equal(after.buffer.replace(priorities=None, weights=None),
                 before.buffer.replace(priorities=None, weights=None))
    assert int(after.step) == int(before.step)


def test_images_of_high_loss_are_drawn_more_often_and_weigh_less():
  """By the student's losses in one batch of all images, to the power of 2/3; it hardly moved."""
  _, student, states, _, _ = toy_run()
  buffer = states[-1].buffer
  images = replay.to_float(buffer.images[0])
  logits = student.network.forward(images, train=True)[0].logits
  losses = np.asarray(divergence.kl(logits, toys.teacher()(images).logits, 4.0))
  assert losses.max() > 4 * losses.min()
  slots = toys.jit(lambda key: priority.sample_by_priority(key, buffer, 4000).slots)(
      jax.random.key(0))
  drawn = np.bincount(np.asarray(slots), minlength=16) / 4000
  slope, _ = np.polyfit(np.log(losses), np.log(drawn), 1)
  assert abs(slope - 2 / 3) < 0.3
  assert np.corrcoef(np.log(losses), np.log(drawn))[0, 1] > 0.7
  assert np.corrcoef(np.log(losses), np.log(buffer.weights[0]))[0, 1] < -0.5


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(label_source='teacher'),
     r"label_source is 'teacher', must be one of \('random', 'argmax', None\)"),
    (dict(label_source='random', task=tasks.segmentation(toys.CLASSES)),
     "must be 'argmax' or None"),
    (dict(counted='argmax'), r"counted is 'argmax', must be one of \('seen', 'asked'\)"),
    (dict(counted='asked', label_source='argmax'),
     "counted is 'asked', must be 'seen' where no class is asked for"),
    (dict(counted='asked', task=tasks.segmentation(toys.CLASSES)),
     "counted is 'asked', must be 'seen'"),
    (dict(gamma=float('nan')), 'gamma is nan, must be at least 0'),
    (dict(draw='weights'), r"draw is 'weights', must be one of \('priority', 'uniform'\)"),
    (dict(new_priority='phi'),
     r"new_priority is 'phi', must be one of \('max', 'modulation', 'one'\)"),
    (dict(normalise_weights='mean'),
     r"normalise_weights is 'mean', must be one of \('none', 'max'\)"),
    (dict(gamma=-0.5), r'gamma is -0.5, must be at least 0'),
    (dict(beta=1.0), r'beta is 1.0, must be in \[0, 1\)'),
    (dict(beta=-0.1), r'beta is -0.1, must be in \[0, 1\)'),
    (dict(epsilon=0.0), r'epsilon is 0.0, must be above 0'),
    (dict(clip_weights=0.0), r'clip_weights is 0.0, must be above 0, or None'),
    (dict(new_priority='modulation', diversity=False, difficulty=False),
     "new_priority is 'modulation', must be 'max'"),
    (dict(capacity=13, num_tasks=4, sample_batch_size=8),
     r'capacity is 13, must be a positive multiple of 4'),
    (dict(meta='maml'), r"meta is 'maml', must be one of"),
    (dict(factors=synth.Factors(one_hot=-1.0)), 'Factor one_hot is -1.0'),
    (dict(betas=0.5), "Unknown argument of ssd_kd 'betas'. Did you mean 'beta'")])
def test_bad_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    ssd_kd(**changes)


def test_a_batch_has_equally_many_of_each_stripe():
  with pytest.raises(
      ValueError, match=r'sample_batch_size is 6, must be a positive multiple of 4 .*such as 8'):
    ssd_kd(num_tasks=4, sample_batch_size=6)
