"""FastDFKD: what one call does, checked by hand and by equalities between its variants."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from flax import traverse_util
from method_runs import assert_close, largest_difference, run

from dfkd_jax import augment, parallel, synth, tasks
from dfkd_jax.losses import inversion
from dfkd_jax.synth import Factors, generators, replay

LATENTS = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)


@functools.cache
def default():
  """Four calls into a buffer of ten images; the adversary sets in with the third."""
  return run(toys.fast_dfkd(capacity=10, adversarial_after=2), calls=4)


def count(state):
  return int(optax.tree_utils.tree_get(state.meta_opt_state, 'count'))


def meta_gradient(state):
  """From Adam's first moment, which after one update of a fresh optimizer is 1 - b1 = 1/2 of it."""
  return jax.tree.map(lambda mu: 2 * mu, optax.tree_utils.tree_get(state.meta_opt_state, 'mu'))


@toys.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def by_hand(params, labels, past, momentum):
  """The loss of one inner step, written out."""
  images = generators.render(toys.generator(), params, LATENTS)
  outputs, running = toys.teacher()(images), toys.teacher().running()
  mixed = jax.tree.map(lambda new, old: (1 - momentum) * new + momentum * old,
                       outputs.moments, past)
  batch_norm = sum(
      jnp.linalg.norm(mixed[path].mean - running[path].mean)
      + jnp.linalg.norm(mixed[path].var - running[path].var)
      for path in running)
  one_hot = inversion.one_hot(outputs.logits, labels).mean()
  adversarial = inversion.adversarial(toys.student()(images).logits, outputs.logits).mean()
  return 0.5 * one_hot + 2.0 * batch_norm + adversarial, (images, outputs)


def test_two_calls_of_one_step_by_hand():
  """One-step first-order MAML is Adam on the plain gradient; momentum begins at the second call."""
  labels = jnp.array([4, 0, 2, 3], jnp.int32)
  task = tasks.classification(toys.CLASSES)._replace(sample_labels=lambda *_: labels)
  (start, first, second), metrics = run(toys.fast_dfkd(
      num_steps=1, task=task, sample_latents=lambda *_: LATENTS, generator_lr=2e-3,
      moments_momentum=0.8), calls=2)

  (loss, (images, outputs)), grads = by_hand(start.meta_params, labels, start.past, 0.0)
  np.testing.assert_allclose(metrics[0]['loss'], [loss], rtol=1e-5)
  assert_close(meta_gradient(first), grads, rtol=1e-3, atol=1e-5)
  # Of a first step Adam leaves the sign; compared where the gradient is not lost in rounding.
  expected = jax.tree.map(lambda p, g: p - 2e-3 * jnp.sign(g), start.meta_params, grads)
  clear = jax.tree.map(lambda g: np.abs(g) > 1e-3, grads)
  assert np.mean(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(clear)])) > 0.5
  jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a[c], b[c], atol=1e-6),
               first.meta_params, expected, clear)
  # The kept image is by the generator before its step; the teacher gives its label.
  stored = np.asarray(first.buffer.images[0, :4], int)
  assert np.abs(stored - np.floor(255 * np.asarray(images)).astype(int)).max() <= 1
  np.testing.assert_array_equal(first.buffer.labels[0, :4], outputs.logits.argmax(1))
  assert_close(first.past, outputs.moments, rtol=1e-5, atol=1e-6)

  (loss, (_, outputs)), _ = by_hand(first.meta_params, labels, first.past, 0.8)
  np.testing.assert_allclose(metrics[1]['loss'], [loss], rtol=1e-5)
  mixed = jax.tree.map(lambda new, old: 0.2 * new + 0.8 * old, outputs.moments, first.past)
  assert_close(second.past, mixed, rtol=1e-5, atol=1e-6)
  assert largest_difference(second.past, outputs.moments) > 1e-3


def test_reptile_goes_where_sequential_arrives():
  """Sequential: the copy becomes the generator. Reptile: the scaled way there is the gradient."""
  (start, arrived), (metrics,) = run(toys.fast_dfkd(meta='sequential'))
  (_, once), _ = run(toys.fast_dfkd(meta='reptile', reptile_scale=1.0, meta_lr=5e-4))
  (_, scaled), (metrics_of_reptile,) = run(toys.fast_dfkd(meta='reptile', meta_lr=5e-4))
  way = jax.tree.map(jnp.subtract, start.meta_params, arrived.meta_params)
  assert_close(meta_gradient(once), way, rtol=1e-3, atol=1e-6)
  assert_close(jax.tree.map(lambda grad: grad / 67, meta_gradient(scaled)),
               way, rtol=1e-3, atol=1e-6)
  assert_close(metrics, metrics_of_reptile, rtol=1e-5, atol=1e-6)
  # The scale reaches the generator through Adam's epsilon only: 1e-8 beside 3e-3.
  clear = jax.tree.map(lambda leaf: np.abs(leaf) > 1e-4, way)
  jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a[c], b[c], atol=1e-6),
               once.meta_params, scaled.meta_params, clear)
  # A first step of Adam moves nearly every parameter by its rate.
  moved = jax.tree.map(lambda a, b: np.abs(a - b).ravel(), start.meta_params, once.meta_params)
  np.testing.assert_allclose(np.median(np.concatenate(jax.tree.leaves(moved))), 5e-4, rtol=1e-3)
  # Nothing was asked of the outer optimizer in the sequential variant.
  assert largest_difference(start.meta_opt_state, arrived.meta_opt_state) == 0
  assert largest_difference(start.meta_params, arrived.meta_params) > 1e-3


def test_the_outer_optimizer_steps_once_a_call():
  states, _ = default()
  assert [count(state) for state in states] == [
      int(state.step) for state in states] == [0, 1, 2, 3, 4]


def test_buffer_and_histogram_grow_by_a_batch_a_call():
  states, _ = default()
  assert [int(state.buffer.size) for state in states] == [0, 4, 8, 10, 10]
  last = states[3].buffer
  np.testing.assert_array_equal(
      last.histogram, np.bincount(np.asarray(last.labels).ravel(), minlength=toys.CLASSES))
  np.testing.assert_array_equal(last.images[0, 4:8], states[2].buffer.images[0, 4:8])


def test_the_adversary_counts_after_its_calls():
  _, metrics = default()
  for index, found in enumerate(metrics):
    assert {name: leaf.shape for name, leaf in found.items()} == dict.fromkeys(
        ('loss', 'one_hot', 'batch_norm', 'adversarial'), (3,))
    assert (found['adversarial'] < -1e-3).all()
    total = 0.5 * found['one_hot'] + 2.0 * found['batch_norm'] + (index >= 2) * found['adversarial']
    np.testing.assert_allclose(found['loss'], total, rtol=1e-5)


def test_the_reset_draws_four_tensors_anew_and_only_once():
  # At rate 0 nothing else moves.
  states, _ = run(toys.fast_dfkd(
      generator=toys.package_generator(), num_steps=1, meta_lr=0.0, reset_after=2), calls=5)
  flat = [traverse_util.flatten_dict(state.meta_params, sep='/') for state in states]
  changed = [{name for name in before if not np.array_equal(before[name], after[name])}
             for before, after in itertools.pairwise(flat)]
  # The batch norm's bias is drawn as well, but was 0 from the start.
  assert changed == [
      set(), set(), {'l1_0/kernel', 'l1_0/bias', 'conv_blocks_0/scale'}, set(), set()]
  after = flat[3]
  assert not np.any(after['l1_0/bias'])
  np.testing.assert_allclose(after['l1_0/kernel'].std(), 0.02, rtol=0.2)
  assert 0 < np.abs(after['conv_blocks_0/scale']).max() < 0.1  # Around 0, not around 1.
  assert [count(state) for state in states] == [0, 1, 2, 3, 4, 5]  # The outer optimizer goes on.


def test_reset_touches_biases_that_have_been_learnt():
  shapes = jax.eval_shape(
      lambda key: generators.init(toys.package_generator(), key, (2, 7))['params'],
      jax.random.key(0))
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
  after = generators.redraw(jax.random.key(1), params, layers=toys.package_generator().first_layers)
  changed = {path for path, leaf in traverse_util.flatten_dict(after, sep='/').items()
             if not np.all(leaf == 1)}
  assert changed == {'l1_0/kernel', 'l1_0/bias', 'conv_blocks_0/scale', 'conv_blocks_0/bias'}
  with pytest.raises(ValueError, match='stem'):
    generators.redraw(jax.random.key(1), params, layers=('stem',))


def test_carried_latents_go_on_and_restart():
  states, _ = run(
      toys.fast_dfkd(num_steps=1, carry_latents=True, restart_every=3, latent_lr=0.01), calls=6)
  assert states[0].latents.shape == (1, 4, 7)
  moved = [float(np.median(np.abs(after.latents - before.latents)))
           for before, after in itertools.pairwise(states)]
  for index, median in enumerate(moved, 1):
    if index in (3, 6):  # Counted from one: drawn anew.
      assert median > 0.1
    else:  # One step of a fresh Adam from where they were.
      np.testing.assert_allclose(median, 0.01, rtol=1e-3)
  # The outer optimizer begins anew with them.
  assert [count(state) for state in states] == [0, 1, 2, 1, 2, 3, 1]
  assert default()[0][0].latents is None  # Not kept otherwise.


@functools.cache
def single_task():
  """One inversion with keys as `num_tasks` inversions hand them out, each alone."""

  @toys.jit
  def single(state, key_latents, key_labels, key_steps):
    task = tasks.classification(toys.CLASSES)
    labels = task.sample_labels(key_labels, 4)
    method = toys.fast_dfkd(
        num_steps=1, sample_latents=lambda _, shape: jax.random.normal(key_latents, shape),
        task=task._replace(sample_labels=lambda *_: labels),
        augment=lambda _, images: augment.flip(jax.random.split(key_steps, 1)[0], images))
    return method.synthesize(state, jax.random.key(99), toys.teacher(), toys.student())

  return single


@pytest.mark.parametrize('task_map', ['vmap', 'map'])
def test_four_tasks_are_the_average_of_four_calls(task_map):
  """In float32 at one inner step: the meta-gradient is the gradient; `task_keys` seed all draws."""
  whole = toys.fast_dfkd(
      num_steps=1, num_tasks=4, task_map=task_map, augment=augment.flip, capacity=16,
      sample_batch_size=8)
  start = toys.jit(whole.init)(jax.random.key(0), toys.teacher())
  alone = start.replace(buffer=replay.create(12, toys.IMAGE, toys.CLASSES))
  with jax.debug_key_reuse(False):  # Which takes the keys of a scan under vmap for used.
    together, metrics = toys.jit(whole.synthesize)(
        start, jax.random.key(5), toys.teacher(), toys.student())
    parents = jax.random.split(jax.random.key(5), 4)[:3]
    keys = [parallel.task_keys(parent, 4, None) for parent in parents]
    found = [single_task()(alone, *(of[task] for of in keys)) for task in range(4)]
  states = [state for state, _ in found]
  mean = lambda of: jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(0), *of)
  assert max(toys.distances(
      meta_gradient(together), mean(map(meta_gradient, states))).values()) <= 1e-5
  assert_close(metrics, mean([metrics for _, metrics in found]), rtol=1e-5, atol=1e-6)
  assert_close(together.past, mean([state.past for state in states]), rtol=1e-5, atol=1e-6)
  # The gradients differ from task to task, or the average would show nothing.
  assert largest_difference(meta_gradient(states[0]), meta_gradient(states[1])) > 1e-2
  for stripe, state in enumerate(states):
    np.testing.assert_array_equal(together.buffer.labels[stripe], state.buffer.labels[0, :4])
    difference = (np.asarray(together.buffer.images[stripe], int)
                  - np.asarray(state.buffer.images[0, :4], int))
    assert np.abs(difference).max() <= 1  # One level of uint8, where 255 x is nearly whole.
  np.testing.assert_array_equal(
      together.buffer.histogram, sum(state.buffer.histogram for state in states))


def test_vmap_and_map_agree_over_several_steps(x64):
  by_vmap, by_map = (
      run(toys.fast_dfkd(meta='reptile', num_tasks=3, num_steps=2, task_map=task_map),
          calls=2, in_float64=True)[0][-1]
      for task_map in ('vmap', 'map'))
  assert_close(by_vmap, by_map, rtol=1e-8, atol=1e-10)


def test_a_task_of_pixels_asks_for_what_the_teacher_sees():
  """Segmentation through the same method: labels of one class an image go to the buffer."""
  teacher, student = toys.dense_teacher(), toys.dense_student()
  method = toys.fast_dfkd(task=tasks.segmentation(toys.CLASSES), num_steps=2)
  state = toys.jit(method.init)(jax.random.key(0), teacher)
  state, metrics = toys.jit(method.synthesize)(state, jax.random.key(1), teacher, student)
  assert np.isfinite(metrics['loss']).all()
  assert state.buffer.labels[:, :4].shape == (1, 4)
  assert int(state.buffer.histogram.sum()) == 4


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(meta='maml'),
     r"meta is 'maml', must be one of \('fomaml', 'reptile', 'sequential', 'reinit'\)"),
    (dict(moments_momentum=1.0), r'moments_momentum is 1.0, must be in \[0, 1\)'),
    (dict(moments_momentum=-0.1), r'moments_momentum is -0.1'),
    (dict(factors=Factors(one_hot=-1.0)), 'Factor one_hot is -1.0'),
    (dict(capacity=13, num_tasks=4, sample_batch_size=8),
     'capacity is 13, must be a positive multiple of 4'),
    (dict(num_steps=0), 'num_steps is 0, must be at least 1'),
    (dict(keep='first'), "keep is 'first'"),
    (dict(task_map='scan'), "task_map is 'scan'"),
    (dict(num_step=3), r"Unknown argument of fast_dfkd 'num_step'. Did you mean 'num_steps'\?")])
def test_bad_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    toys.fast_dfkd(**changes)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(capacity=3), 'capacity is 3, must be at least a batch of 4 images')])
def test_bad_numbers_are_named_at_the_first_call(changes, message):
  method = toys.fast_dfkd(**changes)
  state = jax.eval_shape(method.init, jax.random.key(0), toys.teacher())
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(method.synthesize, state, jax.random.key(1), toys.teacher(), toys.student())


def test_the_adversary_needs_a_student():
  method = toys.fast_dfkd()
  state = jax.eval_shape(method.init, jax.random.key(0), toys.teacher())
  with pytest.raises(ValueError, match='student is None'):
    jax.eval_shape(
        lambda *inputs: method.synthesize(*inputs, None), state, jax.random.key(1), toys.teacher())


def test_a_teacher_without_batch_norm_is_refused():
  teacher = toys.teacher_without_batch_norm()
  with pytest.raises(ValueError, match='The teacher has no BatchNorm'):
    jax.eval_shape(toys.fast_dfkd().init, jax.random.key(0), teacher)
  method = toys.fast_dfkd(factors=Factors(one_hot=1.0))
  state = jax.eval_shape(method.init, jax.random.key(0), teacher)
  _, metrics = jax.eval_shape(method.synthesize, state, jax.random.key(1), teacher, None)
  assert set(metrics) == {'loss', 'one_hot'}


def test_an_unknown_method_is_named_with_the_nearest():
  with pytest.raises(
      ValueError, match=r"Unknown method 'fast_dkfd'. Did you mean 'fast_dfkd'\? Known: "):
    synth.create('fast_dkfd')
