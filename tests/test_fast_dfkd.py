"""FastDFKD: what one call does, checked by hand and by equalities between its variants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from flax import linen as nn
from flax import traverse_util

from dfkd_jax import augment, models, parallel, synth, tasks
from dfkd_jax.losses import inversion
from dfkd_jax.synth import Factors, generative

TEACHER, STUDENT = toys.network(0), toys.network(1, widths=(4, 3))


def run(method, calls=1, state=None):
  """The state after each call, and the metrics of each; one program for all calls."""
  synthesize = jax.jit(method.synthesize)
  state = method.init(jax.random.key(0), TEACHER) if state is None else state
  states, metrics = [state], []
  for index in range(calls):
    state, found = synthesize(state, jax.random.key(10 + index), TEACHER, STUDENT)
    states.append(state)
    metrics.append(found)
  assert synthesize._cache_size() == 1
  return states, metrics


def moment(state):
  """Adam's first moment; after one update of a fresh optimizer, half the meta-gradient, since b1 is 1/2."""
  return optax.tree_utils.tree_get(state.meta_opt_state, 'mu')


def assert_close(tree, other, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, other)


def largest_difference(tree, other):
  return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), tree, other)))


def test_one_step_of_fomaml_is_one_step_of_adam():
  latents, labels = jax.random.normal(jax.random.key(1), (4, 7)), jnp.array([4, 0, 2, 3], jnp.int32)
  task = tasks.classification(toys.CLASSES)._replace(sample_labels=lambda *_: labels)
  (before, after), (metrics,) = run(toys.fast_dfkd(
      num_steps=1, task=task, sample_latents=lambda *_: latents, generator_lr=2e-3))

  @jax.jit
  def by_hand(params):
    images = generative.render(toys.generator(), params, latents)
    outputs = TEACHER(images)
    one_hot = inversion.one_hot(outputs.logits, labels).mean()
    batch_norm = inversion.batch_norm(outputs.moments, TEACHER.running())
    adversarial = inversion.adversarial(STUDENT(images).logits, outputs.logits).mean()
    return 0.5 * one_hot + 2.0 * batch_norm + adversarial, (images, outputs.logits)

  (loss, (images, logits)), grads = jax.value_and_grad(by_hand, has_aux=True)(before.meta_params)
  np.testing.assert_allclose(metrics['loss'], [loss], rtol=1e-5)
  assert_close(jax.tree.map(lambda mu: 2 * mu, moment(after)), grads, rtol=1e-3, atol=1e-5)
  # Of a first step, Adam leaves the sign; only where the gradient is not lost in rounding.
  expected = jax.tree.map(lambda p, g: p - 2e-3 * jnp.sign(g), before.meta_params, grads)
  clear = jax.tree.map(lambda g: np.abs(g) > 1e-3, grads)
  jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a[c], b[c], atol=1e-6), after.meta_params, expected, clear)
  assert np.mean(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(clear)])) > 0.5
  # The image kept is that of the generator before its step, and its label is the teacher's, not the one asked for.
  stored = np.asarray(after.buffer.images[0, :4], int)
  assert np.abs(stored - np.floor(255 * np.asarray(images)).astype(int)).max() <= 1
  np.testing.assert_array_equal(after.buffer.labels[0, :4], logits.argmax(1))


def test_meta_rate_follows_the_inner_one_unless_given():
  """A first step of Adam moves nearly every parameter by its rate."""
  for changes, rate in ((dict(num_steps=2, generator_lr=1e-3), 2e-3), (dict(num_steps=2, meta_lr=5e-4), 5e-4)):
    (before, after), _ = run(toys.fast_dfkd(**changes))
    moved = np.concatenate([
        np.abs(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (before.meta_params, after.meta_params)), strict=True)])
    np.testing.assert_allclose(np.median(moved), rate, rtol=1e-3)
    assert moved.max() < rate * 1.001


def test_reptile_goes_where_sequential_arrives():
  """Sequential: the copy becomes the generator. Reptile: the way there, times its scale, is the gradient."""
  (before, arrived), (metrics,) = run(toys.fast_dfkd(meta='sequential'))
  (_, once), _ = run(toys.fast_dfkd(meta='reptile', reptile_scale=1.0))
  (_, scaled), (metrics_of_reptile,) = run(toys.fast_dfkd(meta='reptile'))
  way = jax.tree.map(jnp.subtract, before.meta_params, arrived.meta_params)
  assert_close(jax.tree.map(lambda mu: 2 * mu, moment(once)), way, rtol=1e-3, atol=1e-6)
  assert_close(jax.tree.map(lambda mu: 2 * mu / 67, moment(scaled)), way, rtol=1e-3, atol=1e-6)
  assert_close(metrics, metrics_of_reptile, rtol=1e-5)
  # The scale reaches the generator through Adam's epsilon only: 1e-8 beside 3e-3.
  clear = jax.tree.map(lambda leaf: np.abs(leaf) > 1e-4, way)
  jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a[c], b[c], atol=2e-6),
               once.meta_params, scaled.meta_params, clear)
  # Nothing was asked of the outer optimizer in the sequential variant.
  assert largest_difference(before.meta_opt_state, arrived.meta_opt_state) == 0
  assert largest_difference(before.meta_params, arrived.meta_params) > 1e-3


def test_the_outer_optimizer_steps_once_a_call():
  states, _ = run(toys.fast_dfkd(), calls=3)
  counts = [int(optax.tree_utils.tree_get(state.meta_opt_state, 'count')) for state in states]
  assert counts == [int(state.step) for state in states] == [0, 1, 2, 3]


def test_buffer_and_histogram_grow_by_a_batch_a_call():
  states, _ = run(toys.fast_dfkd(capacity=10), calls=3)
  assert [int(state.buffer.size) for state in states] == [0, 4, 8, 10]
  last = states[-1].buffer
  np.testing.assert_array_equal(last.histogram, np.bincount(np.asarray(last.labels).ravel(), minlength=toys.CLASSES))
  np.testing.assert_array_equal(last.images[0, 4:8], states[2].buffer.images[0, 4:8])


def test_the_total_is_what_its_terms_say():
  _, (metrics,) = run(toys.fast_dfkd())
  assert {name: leaf.shape for name, leaf in metrics.items()} == dict.fromkeys(
      ('loss', 'one_hot', 'batch_norm', 'adversarial'), (3,))
  total = 0.5 * metrics['one_hot'] + 2.0 * metrics['batch_norm'] + metrics['adversarial']
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-5)


def test_momentum_begins_with_the_second_call():
  with_momentum, found = run(toys.fast_dfkd(moments_momentum=0.9, num_steps=1, meta_lr=0.0), calls=2)
  without, plain = run(toys.fast_dfkd(moments_momentum=0.0, num_steps=1, meta_lr=0.0), calls=2)
  np.testing.assert_allclose(found[0]['loss'], plain[0]['loss'], rtol=1e-6)
  assert abs(float(found[1]['batch_norm'][0] - plain[1]['batch_norm'][0])) > 1e-3
  # With no momentum `past` is the last batch's moments, so the average can be built from them.
  assert_close(with_momentum[1].past, without[1].past, rtol=1e-5)
  mixed = jax.tree.map(lambda first, second: 0.9 * first + 0.1 * second, without[1].past, without[2].past)
  assert_close(with_momentum[2].past, mixed, rtol=1e-5, atol=1e-6)


def test_the_adversary_sets_in_after_its_calls(x64):
  """In float64, since the same sum in another order must not turn a step of Adam around."""
  method = lambda **changes: run_float64(toys.fast_dfkd(num_steps=2, **changes), calls=3)
  late = method(adversarial_after=2)
  never = method(factors=Factors(one_hot=0.5, batch_norm=2.0))
  for index in (1, 2):
    assert_close(late[index].meta_params, never[index].meta_params, rtol=1e-9, atol=1e-12)
  assert largest_difference(late[3].meta_params, never[3].meta_params) > 1e-4


def run_float64(method, calls, key=10):
  teacher, student = toys.float64(TEACHER), toys.float64(STUDENT)
  state = method.init(jax.random.key(0), teacher)
  synthesize = jax.jit(method.synthesize)
  states = [state]
  for index in range(calls):
    states.append(synthesize(states[-1], jax.random.key(key + index), teacher, student)[0])
  return states


def test_the_reset_draws_four_tensors_anew_and_only_once():
  states, _ = run(toys.fast_dfkd(num_steps=1, meta_lr=0.0, reset_after=2), calls=5)  # At rate 0 nothing else moves.
  flat = [traverse_util.flatten_dict(state.meta_params, sep='/') for state in states]
  changed = [{name for name in flat[0] if not np.array_equal(before[name], after[name])}
             for before, after in zip(flat, flat[1:], strict=False)]
  four = {'l1_0/kernel', 'l1_0/bias', 'conv_blocks_0/scale', 'conv_blocks_0/bias'}
  # At rate 0 only a bias that was 0 from the start is drawn as it was.
  assert changed == [set(), set(), four - {'conv_blocks_0/bias'}, set(), set()]
  after = flat[3]
  assert not np.any(after['l1_0/bias'])
  assert not np.any(after['conv_blocks_0/bias'])
  np.testing.assert_allclose(after['l1_0/kernel'].std(), 0.02, rtol=0.2)
  assert abs(float(after['conv_blocks_0/scale'].mean())) < 0.04  # Around 0, not around 1.
  # The outer optimizer goes on.
  assert [int(optax.tree_utils.tree_get(s.meta_opt_state, 'count')) for s in states] == [0, 1, 2, 3, 4, 5]


def test_reset_touches_biases_that_have_been_learnt():
  params = jax.tree.map(jnp.ones_like, generative.init(toys.generator(), jax.random.key(0), (2, 7)))
  after = generative.reset(jax.random.key(1), params, toys.generator().first_layers)
  changed = {path for path, leaf in traverse_util.flatten_dict(after, sep='/').items() if not np.all(leaf == 1)}
  assert changed == {'l1_0/kernel', 'l1_0/bias', 'conv_blocks_0/scale', 'conv_blocks_0/bias'}
  with pytest.raises(ValueError, match="no layer 'stem' to reset"):
    generative.reset(jax.random.key(1), params, ('stem',))


def test_carried_latents_go_on_and_restart():
  changes = dict(num_steps=1, carry_latents=True, latent_lr=0.0, restart_every=3)
  states, _ = run(toys.fast_dfkd(**changes), calls=6)
  same = [np.array_equal(before.latents, after.latents) for before, after in zip(states, states[1:], strict=False)]
  assert same == [True, True, False, True, True, False]  # Calls 3 and 6, counted from one.
  counts = [int(optax.tree_utils.tree_get(state.meta_opt_state, 'count')) for state in states]
  assert counts == [0, 1, 2, 1, 2, 3, 1]  # The outer optimizer begins anew with them.
  assert states[0].latents.shape == (1, 4, 7)


def test_carried_latents_move_by_their_rate():
  (before, after), _ = run(toys.fast_dfkd(num_steps=1, carry_latents=True, latent_lr=0.01))
  np.testing.assert_allclose(np.median(np.abs(after.latents - before.latents)), 0.01, rtol=1e-3)


def test_latents_are_not_kept_otherwise():
  assert run(toys.fast_dfkd(), calls=0)[0][0].latents is None


def test_keep_last_keeps_the_last_rendered():
  """With rates so large that the loss rises, the best image is the first one."""
  changes = dict(num_steps=2, generator_lr=3.0, sample_latents=lambda *_: jax.random.normal(jax.random.key(3), (4, 7)))
  (before, best), (metrics,) = run(toys.fast_dfkd(**changes))
  (_, last), _ = run(toys.fast_dfkd(keep='last', **changes))
  assert metrics['loss'][1] > metrics['loss'][0]
  start = generative.render(toys.generator(), before.meta_params, jax.random.normal(jax.random.key(3), (4, 7)))
  difference = lambda state: np.abs(np.asarray(state.buffer.images[0, :4], int) - np.asarray(255 * start)).max()
  assert difference(best) <= 1.01
  assert difference(last) > 10


@pytest.mark.parametrize('task_map', ['vmap', 'map'])
def test_four_tasks_are_the_average_of_four_calls(task_map):
  """In float32 at one inner step, where the meta-gradient is the gradient itself; all randomness by `task_keys`."""
  key, num_tasks = jax.random.key(5), 4
  key_latents, key_labels, key_steps, _ = jax.random.split(key, 4)
  per_task = lambda parent: parallel.task_keys(parent, num_tasks, None)
  changes = dict(num_steps=1, factors=Factors(one_hot=0.5, batch_norm=2.0, adversarial=1.0))
  whole = toys.fast_dfkd(num_tasks=num_tasks, task_map=task_map, augment=augment.flip, capacity=16, **changes)

  @jax.jit
  def single(state, key_latents, key_labels, key_steps):
    labels = tasks.classification(toys.CLASSES).sample_labels(key_labels, 4)
    method = toys.fast_dfkd(
        sample_latents=lambda _, shape: jax.random.normal(key_latents, shape),
        task=tasks.classification(toys.CLASSES)._replace(sample_labels=lambda *_: labels),
        augment=lambda _, images: augment.flip(jax.random.split(key_steps, 1)[0], images), **changes)
    return method.synthesize(state, jax.random.key(99), TEACHER, STUDENT)

  start = whole.init(jax.random.key(0), TEACHER)
  alone = toys.fast_dfkd(**changes).init(jax.random.key(0), TEACHER)
  assert_close(start.meta_params, alone.meta_params, rtol=0)
  together, metrics = jax.jit(whole.synthesize)(start, key, TEACHER, STUDENT)
  found = [single(alone, *keys) for keys in zip(*map(per_task, (key_latents, key_labels, key_steps)), strict=True)]
  mean = lambda of: jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(0), *of)
  assert_close(moment(together), mean([moment(state) for state, _ in found]), rtol=1e-4, atol=1e-5)
  assert_close(metrics, mean([metrics for _, metrics in found]), rtol=1e-5)
  assert_close(together.past, mean([state.past for state, _ in found]), rtol=1e-5, atol=1e-6)
  # The gradients differ from task to task, or the average would show nothing.
  assert largest_difference(moment(found[0][0]), moment(found[1][0])) > 1e-2
  for stripe, (state, _) in enumerate(found):
    np.testing.assert_array_equal(together.buffer.labels[stripe], state.buffer.labels[0, :4])
    difference = np.asarray(together.buffer.images[stripe], int) - np.asarray(state.buffer.images[0, :4], int)
    assert np.abs(difference).max() <= 1  # One level of uint8, where 255 x is nearly whole.
  np.testing.assert_array_equal(together.buffer.histogram, sum(state.buffer.histogram for state, _ in found))


@pytest.mark.parametrize('meta', ['fomaml', 'reptile'])
def test_vmap_and_map_agree_over_several_steps(meta, x64):
  by_vmap, by_map = (
      run_float64(toys.fast_dfkd(meta=meta, num_tasks=3, num_steps=2, task_map=task_map), calls=2)[-1]
      for task_map in ('vmap', 'map'))
  assert_close(by_vmap, by_map, rtol=1e-8, atol=1e-10)


def test_a_task_of_pixels_asks_for_what_the_teacher_sees():
  """Segmentation through the same method: labels of one class an image go to the buffer."""

  class Dense(nn.Module):

    @nn.compact
    def __call__(self, x, train: bool = False):
      x = nn.Conv(4, (3, 3), use_bias=False)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
      return nn.Conv(toys.CLASSES, (1, 1))(x)

  teacher, student = (models.create_network(Dense(), jax.random.key(seed), toys.IMAGE) for seed in (3, 4))
  method = toys.fast_dfkd(task=tasks.segmentation(toys.CLASSES), num_steps=2)
  state = method.init(jax.random.key(0), teacher)
  state, metrics = jax.jit(method.synthesize)(state, jax.random.key(1), teacher, student)
  assert np.isfinite(metrics['loss']).all()
  assert state.buffer.labels[:, :4].shape == (1, 4)
  assert int(state.buffer.histogram.sum()) == 4


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(meta='maml'), r"meta is 'maml', must be one of \('fomaml', 'reptile', 'sequential'\)"),
    (dict(moments_momentum=1.0), r'moments_momentum is 1.0, must be in \[0, 1\)'),
    (dict(moments_momentum=-0.1), r'moments_momentum is -0.1'),
    (dict(factors=Factors(one_hot=-1.0)), 'Factor one_hot is -1.0'),
    (dict(capacity=13, num_tasks=4), r'capacity is 13, must be a positive multiple of 4 .*such as 12'),
    (dict(task_map='scan'), "task_map is 'scan'"),
    (dict(num_step=3), r"Unknown argument of fast_dfkd 'num_step'. Did you mean 'num_steps'\?")])
def test_bad_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    toys.fast_dfkd(**changes)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(num_steps=0), 'num_steps is 0, must be at least 1'),
    (dict(keep='first'), "keep is 'first'"),
    (dict(capacity=3), 'capacity is 3, must be at least a batch of 4 images')])
def test_bad_numbers_are_named_at_the_first_call(changes, message):
  method = toys.fast_dfkd(**changes)
  state = method.init(jax.random.key(0), TEACHER)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(method.synthesize, state, jax.random.key(1), TEACHER, STUDENT)


def test_the_adversary_needs_a_student():
  method = toys.fast_dfkd()
  state = method.init(jax.random.key(0), TEACHER)
  with pytest.raises(ValueError, match='student is None'):
    jax.eval_shape(lambda *inputs: method.synthesize(*inputs, None), state, jax.random.key(1), TEACHER)


def test_a_teacher_without_batch_norm_is_refused():

  class Plain(nn.Module):

    @nn.compact
    def __call__(self, x):
      return nn.Dense(toys.CLASSES)(x.mean((1, 2)))

  teacher = models.create_network(Plain(), jax.random.key(0), toys.IMAGE)
  with pytest.raises(ValueError, match='The teacher has no BatchNorm'):
    toys.fast_dfkd().init(jax.random.key(0), teacher)
  method = toys.fast_dfkd(factors=Factors(one_hot=1.0))
  state = method.init(jax.random.key(0), teacher)
  _, metrics = jax.eval_shape(method.synthesize, state, jax.random.key(1), teacher, None)
  assert set(metrics) == {'loss', 'one_hot'}


def test_an_unknown_method_is_named_with_the_nearest():
  with pytest.raises(ValueError, match=r"Unknown method 'fast_dkfd'. Did you mean 'fast_dfkd'\? Known: "):
    synth.create('fast_dkfd')
