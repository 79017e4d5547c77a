"""DeepInversion: pixels, what is kept of them, and its terms, checked by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from method_runs import Noting, abstract_call, assert_close, on_devices, one_by_one, run

from dfkd_jax import augment, synth, tasks
from dfkd_jax.losses import inversion
from dfkd_jax.synth import Factors, objective, replay

MEAN, STD = np.array(toys.MEAN), np.array(toys.STD)
ALL_TERMS = Factors(
    one_hot=1.0, batch_norm=2.0, adversarial=0.7, total_variation=0.3, l2=0.05,
    student_batch_norm=0.1)


def deep_inversion(**changes):
  return synth.create('deep_inversion', **{
      'image_shape': toys.IMAGE, 'task': tasks.classification(toys.CLASSES),
      'factors': Factors(one_hot=1.0, batch_norm=2.0, adversarial=1.0), 'num_steps': 3,
      'batch_size': 4, 'sample_batch_size': 6, 'capacity': 12, 'augment': augment.identity,
      **changes})


def levels(images):
  """As the buffer holds them, but for rounding where 255 x is nearly whole."""
  return np.floor(255 * np.clip(images, 0, 1)).astype(int)


def assert_same_images(kept, images):
  difference = np.abs(np.asarray(kept, int) - levels(images))
  assert difference.max() <= 1
  # Whole numbers are common: pixels at the bounds are 0 or 255.
  assert (difference == 0).mean() > 0.95


def rolled(key, images):
  """The same in each step, so that calls of more or fewer steps can be compared."""
  del key
  return jnp.roll(images, (5, 3), axis=(1, 2))


@functools.cache
def noted():
  """One call of five steps, the first goes too far: images given and seen, metrics, state after."""
  noting = Noting(rolled)
  (_, state), (metrics,) = run(
      deep_inversion(num_steps=5, learning_rate=0.6, factors=ALL_TERMS, augment=noting))
  return *noting.given_and_seen(), metrics, state


def test_pixels_stay_within_bounds_after_each_step():
  given, *_ = noted()
  assert given.shape == (5, 4, *toys.IMAGE)
  assert given[0].min() < -0.1  # Noise.
  assert given[0].max() > 1.1
  np.testing.assert_allclose(given[1:].min((0, 1, 2, 3)), 0, atol=1e-6)  # Reached, in each channel.
  np.testing.assert_allclose(given[1:].max((0, 1, 2, 3)), 1, atol=1e-6)


def test_noise_is_normal_in_the_units_of_the_teacher():
  given, *_ = noted()
  noise = (given[0] - MEAN) / STD
  np.testing.assert_allclose(noise.mean((0, 1, 2)), 0, atol=0.2)
  np.testing.assert_allclose(noise.std((0, 1, 2)), 1, atol=0.15)


def test_the_best_step_is_kept():
  given, seen, metrics, state = noted()
  best = int(metrics['loss'].argmin())
  assert 0 < best < 4  # Or the test would not tell it from the first or the last.
  assert_same_images(state.buffer.images[0, :4], given[best])
  assert np.abs(np.asarray(state.buffer.images[0, :4], int) - levels(given[-1])).max() > 9
  np.testing.assert_array_equal(
      state.buffer.labels[0, :4], toys.teacher()(seen[best]).logits.argmax(1))


def test_last_is_the_iterate_after_the_last_update():
  """Which is what a call of one more step begins its last one with."""
  given, seen, metrics, _ = noted()
  (_, state), (found,) = run(deep_inversion(
      num_steps=4, learning_rate=0.6, factors=ALL_TERMS, augment=rolled, keep='last'))
  np.testing.assert_allclose(found['loss'], metrics['loss'][:4], rtol=1e-4)
  assert_same_images(state.buffer.images[0, :4], given[4])
  np.testing.assert_array_equal(
      state.buffer.labels[0, :4], toys.teacher()(seen[3]).logits.argmax(1))


def test_terms_by_hand():
  """Total variation and norm are of normalised pixels, not moved; student moments are repelled."""
  given, seen, metrics, _ = noted()

  @toys.jit
  @jax.vmap
  def by_hand(images):
    seen_by_teacher, seen_by_student = toys.teacher()(images), toys.student()(images)
    js = inversion.adversarial(
        seen_by_student.logits, seen_by_teacher.logits, masked=False, divergence='js',
        temperature=3.0)
    return {'batch_norm': inversion.batch_norm(seen_by_teacher.moments, toys.teacher().running()),
            'student_batch_norm': -inversion.batch_norm(
                seen_by_student.moments, toys.student().running()),
            'adversarial': js.mean()}

  expected = by_hand(seen)
  pixels = (given.astype(np.float64) - MEAN) / STD
  expected['l2'] = np.sqrt((pixels**2).sum((1, 2, 3, 4)))
  neighbours = [(pixels[:, :, 1:], pixels[:, :, :-1]), (pixels[:, :, :, 1:], pixels[:, :, :, :-1]),
                (pixels[:, :, 1:, 1:], pixels[:, :, :-1, :-1]),
                (pixels[:, :, 1:, :-1], pixels[:, :, :-1, 1:])]
  expected['total_variation'] = sum(np.abs(a - b).mean((1, 2, 3, 4)) for a, b in neighbours)
  assert set(metrics) == {'loss', 'one_hot', *expected}
  for name, values in expected.items():
    np.testing.assert_allclose(metrics[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
  assert (metrics['student_batch_norm'] < -1).all()
  total = sum(getattr(ALL_TERMS, name) * metrics[name] for name in metrics if name != 'loss')
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-5)


def test_the_adversary_counts_after_its_calls():
  factors = Factors(one_hot=1.0, batch_norm=2.0, adversarial=100.0)
  _, metrics = run(deep_inversion(num_steps=2, adversarial_after=1, factors=factors), calls=2)
  for index, found in enumerate(metrics):
    assert set(found) == {'loss', 'one_hot', 'batch_norm', 'adversarial'}
    assert (found['adversarial'] < -1e-4).all()
    total = (found['one_hot'] + 2.0 * found['batch_norm']
             + 100.0 * (index >= 1) * found['adversarial'])
    np.testing.assert_allclose(found['loss'], total, rtol=1e-5)


def jitters(given, seen):
  """Every (rows, columns, flipped) by which the whole batch was moved, of all that could be."""
  rolled = {(h, w): np.roll(given, (h, w), axis=(1, 2))
            for h, w in itertools.product(range(-4, 5), repeat=2)}
  return [(h, w, flipped) for (h, w), moved in rolled.items() for flipped in (False, True)
          if np.array_equal(moved[:, :, ::-1] if flipped else moved, seen)]


def test_the_jitter_is_one_for_the_batch_and_new_in_each_step():
  noting = Noting(augment.roll_and_flip)
  method = deep_inversion(num_steps=7, factors=Factors(one_hot=1.0), augment=noting)
  state = toys.jit(method.init)(jax.random.key(0), toys.teacher())
  toys.jit(method.synthesize)(state, jax.random.key(1), toys.teacher(), None)
  found = [jitters(given, seen) for given, seen in zip(*noting.given_and_seen(), strict=True)]
  assert all(found)  # One jitter explains all images; on 8 columns, rolls by -4 and 4 are the same.
  assert len({ways[0] for ways in found}) > 3
  assert len({ways[0][2] for ways in found}) == 2


def test_each_call_begins_at_noise_of_its_own():
  (start, first, second), _ = run(deep_inversion(num_steps=1, learning_rate=0.0), calls=2)
  assert [int(state.step) for state in (start, first, second)] == [0, 1, 2]
  np.testing.assert_array_equal(second.buffer.images[0, :4], first.buffer.images[0, :4])
  assert np.abs(
      np.asarray(second.buffer.images[0, 4:8], int) - first.buffer.images[0, :4]).mean() > 20
  np.testing.assert_array_equal(
      second.buffer.histogram,
      np.bincount(np.asarray(second.buffer.labels[0, :8]), minlength=toys.CLASSES))


def test_labels_asked_for_are_what_the_teacher_comes_to_see():
  """Forty steps under one_hot alone, towards labels of which none is common among noise."""
  labels = jnp.array([3, 0, 4, 2], jnp.int32)
  task = tasks.classification(toys.CLASSES)._replace(sample_labels=lambda *_: labels)
  method = deep_inversion(num_steps=40, factors=Factors(one_hot=1.0), task=task, keep='last')
  (_, state), (metrics,) = run(method)
  assert metrics['one_hot'][-1] < 0.3 * metrics['one_hot'][0]
  np.testing.assert_array_equal(
      toys.teacher()(replay.to_float(state.buffer.images[0, :4])).logits.argmax(1), labels)


@pytest.mark.parametrize('task_map', ['vmap', 'map'])
def test_three_tasks_are_three_calls(task_map, x64):
  networks = toys.float64(toys.teacher()), toys.float64(toys.student())
  changes = dict(num_steps=2, augment=augment.roll_and_flip)
  method = deep_inversion(num_tasks=3, task_map=task_map, **changes)
  state = toys.jit(method.init)(jax.random.key(0), networks[0])
  with jax.debug_key_reuse(False):  # Which takes the keys of a scan under vmap for used.
    together, metrics = toys.jit(method.synthesize)(state, jax.random.key(5), *networks)
    found = one_by_one(deep_inversion(**changes), 3, networks)
  for stripe, (state, _) in enumerate(found):
    np.testing.assert_array_equal(together.buffer.images[stripe], state.buffer.images[0, :4])
    np.testing.assert_array_equal(together.buffer.labels[stripe], state.buffer.labels[0, :4])
  assert_close(metrics, jax.tree.map(
      lambda *each: np.mean(each, 0), *(each for _, each in found)), rtol=1e-9)
  assert len({float(each['loss'][0]) for _, each in found}) == 3
  np.testing.assert_array_equal(
      together.buffer.histogram, sum(state.buffer.histogram for state, _ in found))


@pytest.mark.exhaustive
def test_four_devices_equal_four_tasks(x64):
  networks = toys.float64(toys.teacher()), toys.float64(toys.student())
  create = lambda num_tasks, axis: deep_inversion(
      num_steps=2, num_tasks=num_tasks, axis=axis, capacity=6 * num_tasks,
      sample_batch_size=num_tasks, task_map='map', augment=augment.roll_and_flip)
  assert_close(on_devices(create, networks, 4), on_devices(create, networks, 1), rtol=1e-9)


def test_a_task_of_pixels_asks_for_what_the_teacher_sees():
  teacher, student = toys.dense_teacher(), toys.dense_student()
  method = deep_inversion(
      task=tasks.segmentation(toys.CLASSES), learning_rate=0.03,
      factors=Factors(one_hot=1.0, adversarial=0.01),
      sample_pixels=lambda key, shape: 0.5 + 0.1 * jax.random.normal(key, shape))
  state = toys.jit(method.init)(jax.random.key(0), teacher)
  state, metrics = toys.jit(method.synthesize)(state, jax.random.key(1), teacher, student)
  assert np.isfinite(metrics['loss']).all()
  assert (np.diff(metrics['one_hot']) < 0).all()
  assert int(state.buffer.histogram.sum()) == 4


def test_a_student_is_needed_by_the_terms_that_look_at_it():
  for factors in (Factors(adversarial=1.0), Factors(one_hot=1.0, student_batch_norm=0.01)):
    with pytest.raises(ValueError, match='student is None'):
      abstract_call(deep_inversion(factors=factors), toys.teacher(), None)
  _, metrics = abstract_call(
      deep_inversion(factors=Factors(one_hot=1.0, batch_norm=10.0, total_variation=1e-3)),
      toys.teacher(), None)
  assert set(metrics) == {'loss', 'one_hot', 'batch_norm', 'total_variation'}


def test_a_teacher_without_batch_norm_is_refused():
  teacher = toys.teacher_without_batch_norm()
  with pytest.raises(ValueError, match='The teacher has no BatchNorm'):
    abstract_call(deep_inversion(), teacher, toys.student())
  _, metrics = abstract_call(deep_inversion(factors=Factors(one_hot=1.0)), teacher, None)
  assert set(metrics) == {'loss', 'one_hot'}


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(keep='first'), r"keep is 'first', must be one of \('best', 'last'\)"),
    (dict(factors=Factors(l2=-1.0)), 'Factor l2 is -1.0'),
    (dict(capacity=13, num_tasks=4, sample_batch_size=8),
     r'capacity is 13, must be a positive multiple of 4 .*such as 12'),
    (dict(task_map='scan'), "task_map is 'scan'"),
    (dict(latent_dim=3), "Unknown argument of deep_inversion 'latent_dim'")])
def test_bad_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    deep_inversion(**changes)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(num_steps=0), 'num_steps is 0, must be at least 1'),
    (dict(capacity=3), 'capacity is 3, must be at least a batch of 4 images'),
    (dict(adversary=objective.Adversary('l3')), "divergence is 'l3'"),
    (dict(task=tasks.classification(7)), 'The task has 7 classes, must have 5')])
def test_bad_numbers_are_named_at_the_first_call(changes, message):
  with pytest.raises(ValueError, match=message):
    abstract_call(deep_inversion(**changes), toys.teacher(), toys.student())
