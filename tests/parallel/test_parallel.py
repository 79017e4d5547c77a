"""Four virtual devices with one task each against one device with four tasks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from flax import struct
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from dfkd_jax import augment, distill, parallel
from dfkd_jax.losses import divergence
from dfkd_jax.synth import replay

NUM = 4
ONE, SPREAD = parallel.REPLICATED, PartitionSpec(parallel.AXIS)


def assert_close(tree, other, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, other)


def test_four_devices_are_at_hand():
  assert len(jax.devices()) >= NUM


class Inner(struct.PyTreeNode):
  striped: jax.Array = parallel.sharded()
  count: jax.Array


class Outer(struct.PyTreeNode):
  inner: Inner
  latents: jax.Array | None = parallel.sharded()
  pair: tuple
  name: str = struct.field(pytree_node=False, default='x')


def outer(latents=True):
  inner = Inner(striped=jnp.zeros((4, 3)), count=jnp.int32(0))
  return Outer(
      inner=inner, latents=jnp.ones((4, 2)) if latents else None,
      pair=(jnp.zeros(2), {'a': jnp.zeros(3)}))


def test_specs_follow_the_declared_fields():
  specs = parallel.specs(outer())
  assert (specs.inner.striped, specs.inner.count, specs.latents) == (SPREAD, ONE, SPREAD)
  assert specs.pair == (ONE, {'a': ONE})
  assert specs.name == 'x'
  assert parallel.specs(outer(latents=False)).latents is None
  assert parallel.specs({'a': jnp.zeros(2)}) == {'a': ONE}


def test_place_splits_what_is_sharded_and_copies_the_rest():
  placed = parallel.place(parallel.make_mesh(NUM), outer())
  assert [shard.data.shape for shard in placed.inner.striped.addressable_shards] == [(1, 3)] * NUM
  assert placed.pair[0].is_fully_replicated
  assert placed.inner.striped.shape == (4, 3)  # Global shapes do not depend on the devices.


def test_a_mesh_of_more_devices_than_there_are():
  total = len(jax.devices())
  assert parallel.make_mesh().size == total
  assert parallel.make_mesh(2).size == 2
  for wrong in (0, total + 1):
    with pytest.raises(ValueError, match=rf'num_devices is {wrong}, must be in 1..{total}'):
      parallel.make_mesh(wrong)


def test_even_share():
  assert parallel.even_share(12, 4, 'batch_size') == 3
  for total, near in ((13, 12), (15, 16), (1, 4), (0, 4), (-4, 4)):
    with pytest.raises(
        ValueError, match=rf'size is {total}, must be a positive multiple of 4 .*such as {near}\.'):
      parallel.even_share(total, 4, 'batch_size')


def over(size, function, *, arguments=(ONE,), results=SPREAD):
  return parallel.each_device(function, parallel.make_mesh(size), arguments, results)


@pytest.mark.parametrize('size', [1, 2, 4])
def test_task_keys_do_not_depend_on_the_layout(size):
  keys = over(
      size, lambda key, *, axis: jax.random.key_data(parallel.task_keys(key, NUM // size, axis)))
  expected = jax.random.key_data(parallel.task_keys(jax.random.key(3), NUM, None))
  np.testing.assert_array_equal(keys(jax.random.key(3)), expected)
  assert len({tuple(key) for key in expected.tolist()}) == NUM


@pytest.mark.parametrize('size', [1, 2, 4])
def test_by_task_gives_every_share_its_own_key(size):
  images = jax.random.uniform(jax.random.key(0), (8, 4, 3, 1))
  flip_tasks = lambda key, images, *, axis: (
      parallel.by_task(augment.flip, NUM // size, axis)(key, images))
  flip = over(size, flip_tasks, arguments=(ONE, SPREAD))
  parts = [
      augment.flip(jax.random.fold_in(jax.random.key(1), task), images[2 * task:2 * task + 2])
      for task in range(NUM)]
  np.testing.assert_array_equal(flip(jax.random.key(1), images), jnp.concatenate(parts))


def test_means_and_sums_are_over_the_axis_or_nothing():
  values = jnp.arange(4.0)
  assert parallel.pmean(values, None) is values
  assert parallel.psum(values, None) is values
  both = lambda v, *, axis: (parallel.pmean(v, axis), parallel.psum(v, axis))
  mean, total = over(NUM, both, arguments=(SPREAD,), results=(ONE, ONE))(values)
  assert (mean.item(), total.item()) == (1.5, 6.0)


def method(size, axis, **changes):
  return toys.fast_dfkd(
      num_tasks=NUM // size, capacity=24 // size, sample_batch_size=16 // size, task_map='map',
      axis=axis,
      augment=augment.flip, **changes)


def start(teacher, **changes):
  """The same global state for every layout: four stripes of six images."""
  return toys.jit(method(1, None, **changes).init)(jax.random.key(0), teacher)


def calls(state, networks, num, size, **changes):
  """The state after `num` calls on `size` devices, and the metrics of the last."""
  mesh, spread = parallel.make_mesh(size), parallel.specs(state)
  traced = []

  def step(state, key, teacher, student, *, axis):
    traced.append(axis)
    return method(size, axis, **changes).synthesize(state, key, teacher, student)

  program = toys.jit(parallel.each_device(step, mesh, (spread, ONE, ONE, ONE), (spread, ONE)))
  state, networks = parallel.place(mesh, state), parallel.place(mesh, networks)
  for index in range(num):
    state, metrics = program(state, jax.random.key(20 + index), *networks)
  assert len(traced) == 1
  return state, metrics


def calls_by_pmap(state, networks, num, **changes):
  """The same by `jax.pmap`, which takes a leading axis of devices on everything."""
  replicate = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf] * NUM), tree)
  split = lambda spec, leaf: (
      leaf.reshape(NUM, -1, *leaf.shape[1:]) if spec == SPREAD else jnp.stack([leaf] * NUM))
  join = lambda spec, leaf: leaf.reshape(-1, *leaf.shape[2:]) if spec == SPREAD else leaf[0]
  specs = parallel.specs(state)
  program = jax.pmap(method(NUM, 'batch', **changes).synthesize, axis_name='batch')
  state = jax.tree.map(split, specs, state)
  for index in range(num):
    with jax.debug_key_reuse(False):  # Each device gets the same key.
      key = jax.random.key(20 + index)
      state, metrics = program(state, *map(replicate, (key, *networks)))
  first = lambda leaf: leaf[0]
  return jax.tree.map(join, specs, jax.device_get(state)), jax.tree.map(first, metrics)


def check(
    result, expected, names=('step', 'latents', 'past', 'meta_params', 'meta_opt_state', 'ema'),
    **tolerance):
  (state, metrics), (other, other_metrics) = jax.device_get((result, expected))
  assert_close(metrics, other_metrics, **tolerance)
  for name in names:
    assert_close(getattr(state, name), getattr(other, name), **tolerance)
  images, other_images = (of.buffer.images.astype(int) for of in (state, other))
  assert np.abs(images - other_images).max() <= 1
  assert (images == other_images).mean() > 0.999  # But for a level where 255 x is nearly whole.
  for name in ('labels', 'histogram', 'next', 'size'):
    np.testing.assert_array_equal(getattr(state.buffer, name), getattr(other.buffer, name))


@pytest.mark.parametrize('meta', [
    'fomaml', pytest.param('reptile', marks=pytest.mark.exhaustive)])
def test_four_devices_equal_four_tasks_over_several_steps(meta, x64):
  """In float64; in float32 Adam turns rounding into steps of the other sign."""
  networks = toys.float64(toys.teacher()), toys.float64(toys.student())
  changes = dict(meta=meta, num_steps=2, carry_latents=meta == 'reptile', ema_decay=0.5)
  begin = start(networks[0], **changes)
  expected = calls(begin, networks, 2, 1, **changes)
  check(calls(begin, networks, 2, NUM, **changes), expected, rtol=1e-8, atol=1e-10)
  assert int(expected[0].buffer.histogram.sum()) == NUM * 6  # Full, of several classes.
  assert (np.asarray(expected[0].buffer.histogram) > 0).sum() >= 2
  if meta == 'fomaml':
    check(calls_by_pmap(begin, networks, 2, **changes), expected, rtol=1e-8, atol=1e-10)


def test_four_devices_equal_four_tasks_in_float32():
  """With one inner step and no outer step: devices share the meta-gradient."""
  networks = toys.teacher(), toys.student()
  changes = dict(num_steps=1, meta_lr=0.0)
  begin = start(networks[0], **changes)
  result, expected = (calls(begin, networks, 2, size, **changes) for size in (NUM, 1))
  check(result, expected, ('step', 'past'), rtol=1e-5, atol=1e-6)
  grads = [
      optax.tree_utils.tree_get(jax.device_get(state.meta_opt_state), 'mu')
      for state, _ in (result, expected)]
  distances = toys.distances(*grads)
  assert max(distances.values()) <= 1e-5, distances


def test_samples_do_not_depend_on_the_layout():
  buffer = replay.create(5, (3, 2, 1), 4, num_tasks=NUM)
  images = jax.random.uniform(jax.random.key(0), (NUM, 5, 3, 2, 1))
  buffer = replay.add(buffer, images, jnp.arange(NUM * 5).reshape(NUM, 5) % 4)
  samples = []
  for size in (1, 2, 4):
    draw = lambda key, buffer, *, axis, size=size: replay.sample(key, buffer, 8 // size, axis)[:2]
    placed = parallel.place(parallel.make_mesh(size), buffer)
    samples.append(
        over(size, draw, arguments=(ONE, parallel.specs(buffer)))(jax.random.key(1), placed))
  for drawn in samples[1:]:
    assert_close(drawn, samples[0], rtol=0)


def student_on(size, program, *inputs):
  return parallel.each_device(
      program, parallel.make_mesh(size), (ONE, SPREAD, SPREAD), (ONE, ONE))(*inputs)


def test_one_step_of_the_student_is_the_same_on_four_devices():
  """With SGD; its batch norms normalise by the whole batch, and so do their running moments."""
  tx = distill.coupled_sgd(0.1, momentum=0.9, weight_decay=1e-3)
  student = distill.init(toys.student(), tx)
  brightness = jnp.linspace(0.1, 1, 16)[:, None, None, None]
  images = jax.random.uniform(jax.random.key(0), (16, *toys.IMAGE)) * brightness
  targets = toys.jit(toys.teacher())(images).logits

  def step(student, images, targets, *, axis):
    loss_fn = lambda outputs: (divergence.kl(outputs.logits, targets, 4.0).mean(), ())
    return distill.train_step(student, images, loss_fn, tx, axis)[:2]

  (one, loss), (four, other) = (
      student_on(size, step, student, images, targets) for size in (1, NUM))
  np.testing.assert_allclose(loss, other, rtol=1e-5)
  assert_close(four.network.batch_stats, one.network.batch_stats, rtol=1e-5, atol=1e-6)
  step_of = lambda state: jax.tree.map(jnp.subtract, state.network.params, student.network.params)
  for tree, other in ((step_of(four), step_of(one)), (four.opt_state, one.opt_state)):
    distances = toys.distances(tree, other)
    assert max(distances.values()) <= 1e-5, distances
  moved = jax.tree.map(
      lambda a, b: np.abs(a - b).max(), one.network.batch_stats, student.network.batch_stats)
  assert min(jax.tree.leaves(moved)) > 1e-3
  # Each device by itself would get other moments: the test can tell.
  alone, _ = student_on(1, step, student, images[:4], targets[:4])
  apart = jax.tree.map(
      lambda a, b: np.abs(a - b).max(), one.network.batch_stats, alone.network.batch_stats)
  assert max(jax.tree.leaves(apart)) > 1e-3


def test_a_round_of_the_student_is_the_same_on_four_devices():
  """Samples, augmentation, steps and metrics, from a buffer that is spread."""
  tx = optax.sgd(1e-3)
  state = start(toys.teacher())
  images = jax.random.uniform(jax.random.key(0), (NUM, 6, *toys.IMAGE))
  state = state.replace(buffer=replay.add(state.buffer, images, jnp.zeros((NUM, 6), jnp.int32)))
  student, spread = distill.init(toys.student(), tx), parallel.specs(state)

  def round_of(student, state, key, teacher, *, axis, size):
    return distill.distill(
        student, state, key, teacher, synthesizer=method(size, axis), tx=tx, num_steps=3,
        augment=augment.flip,
        num_tasks=NUM // size, axis=axis)

  results = []
  for size in (1, NUM):
    mesh = parallel.make_mesh(size)
    program = toys.jit(parallel.each_device(
        functools.partial(round_of, size=size), mesh, (ONE, spread, ONE, ONE), (ONE, spread, ONE)))
    inputs = (
        parallel.place(mesh, student), parallel.place(mesh, state), jax.random.key(7),
        toys.teacher())
    results.append(jax.device_get(program(*inputs)))
  (one, state_of_one, metrics), (four, state_of_four, other) = results
  assert_close(other, metrics, rtol=1e-5)
  moved = [
      jax.tree.map(jnp.subtract, of.network.params, student.network.params) for of in (four, one)]
  # Of the whole way: over three steps rounding adds up in the tensors that move least.
  of_four, of_one = (ravel_pytree(tree)[0] for tree in moved)
  assert np.linalg.norm(of_four - of_one) <= 1e-5 * np.linalg.norm(of_one)
  assert max(toys.distances(*moved).values()) <= 1e-4
  assert_close(four.network.batch_stats, one.network.batch_stats, rtol=1e-5, atol=1e-6)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.network, student.network)
  assert max(jax.tree.leaves(moved)) > 1e-2
  assert_close(state_of_four, state_of_one, rtol=0)
  assert int(four.step) == 3
