"""CMI by its equalities: without the contrast, with it, and over tasks and devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from cmi_toys import CONTRAST, cmi, count, features_of, projected
from method_runs import abstract_call, assert_close, largest_difference, on_devices, one_by_one, run

from dfkd_jax import augment, models, tasks
from dfkd_jax.synth import Factors, generators, replay


def test_redraw():
  """Kernels from N(0, 0.02^2), scales from N(1, 0.02^2), biases 0, whatever was there."""
  generator = models.Generator(image_shape=(16, 16, 3), width=32)
  shapes = jax.eval_shape(
      lambda key: generators.init(generator, key, (2, 40))['params'], jax.random.key(0))
  params, redraw = (
      jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes), toys.jit(generators.redraw))
  drawn = redraw(jax.random.key(1), params)
  assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)
  by_name = {}
  for path, leaf in jax.tree.leaves_with_path(drawn):
    by_name.setdefault(path[-1].key, []).append(np.ravel(leaf))
  assert set(by_name) == {'kernel', 'scale', 'bias'}
  assert not np.concatenate(by_name['bias']).any()
  for leaf in by_name['kernel']:
    np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.1)
    np.testing.assert_allclose(leaf.mean(), 0, atol=0.003)
  scales = np.concatenate(by_name['scale'])
  np.testing.assert_allclose([scales.mean(), scales.std()], [1, 0.02], rtol=0.2)
  # Each leaf has a key of its own.
  assert len({float(leaf[0]) for name in ('kernel', 'scale') for leaf in by_name[name]}) == 7
  assert largest_difference(drawn, redraw(jax.random.key(2), params)) > 0.02


def test_the_generator_is_drawn_anew_for_each_call():
  """At rates of 0 it is what was drawn, and does not depend on what was there."""
  method = cmi(
      num_steps=1, generator_lr=0.0, latent_lr=0.0, generator=toys.package_generator(width=5),
      factors=Factors(contrast=0.8))
  state = toys.jit(method.init)(jax.random.key(0), toys.teacher())
  synthesize = toys.jit(method.synthesize)
  drawn_by = lambda state, seed: synthesize(state, jax.random.key(seed), toys.teacher(), None)[0]
  first = drawn_by(state, 10)
  second, again = drawn_by(first, 11), drawn_by(state, 11)
  drawn = [of.inversion.meta_params for of in (state, first, second)]
  for before, after in itertools.pairwise(drawn):
    assert largest_difference(before['l1_0'], after['l1_0']) > 0.02
    np.testing.assert_allclose(after['l1_0']['kernel'].std(), 0.02, rtol=0.2)
    np.testing.assert_allclose(after['conv_blocks_0']['scale'], 1, atol=0.1)
    assert not after['l1_0']['bias'].any()
  assert largest_difference(again.inversion.meta_params, drawn[2]) == 0


def test_without_contrast_it_is_fast_dfkd_with_a_new_generator():
  """Exactly: states, images, labels and metrics, on the same keys."""
  factors = CONTRAST._replace(contrast=0.0)
  numbers = dict(
      factors=factors, num_steps=2, generator_lr=2e-3, latent_lr=5e-3, augment=augment.flip)
  states, metrics = run(cmi(**numbers), calls=2)
  others, other_metrics = run(
      toys.fast_dfkd(meta='reinit', moments_momentum=0.0, capacity=12, **numbers), calls=2)
  for state, other in zip(states[1:], others[1:], strict=True):
    jax.tree.map(np.testing.assert_array_equal, state.inversion, other)
    assert (int(state.size), state.bank, state.head) == (0, None, None)
  jax.tree.map(np.testing.assert_array_equal, metrics, other_metrics)
  assert np.isfinite(metrics[1]['loss']).all()


def test_without_an_adversary_no_student_is_needed():
  _, metrics = abstract_call(cmi(factors=CONTRAST._replace(adversarial=0.0)), toys.teacher(), None)
  assert set(metrics) == {'loss', 'one_hot', 'batch_norm', 'contrast'}
  with pytest.raises(ValueError, match='student is None'):
    abstract_call(cmi(), toys.teacher(), None)


def test_contrast_makes_the_images_of_a_batch_differ():
  """Projections by a head that stays point apart with the term; a wrong sign would join them."""

  @toys.jit
  def call(state, key, factor):
    method = cmi(
        factors=Factors(one_hot=0.1, contrast=factor), num_steps=40, generator_lr=1e-2,
        latent_lr=5e-2, head_lr=0.0, contrast_temperature=0.1, keep='last', batch_size=6)
    return method.synthesize(state, key, toys.teacher(), None)

  state = toys.jit(cmi(batch_size=6).init)(jax.random.key(0), toys.teacher())
  for seed in range(3):
    alike, contrast = [], []
    for factor in (3.0, 1e-9):
      after, metrics = call(state, jax.random.key(seed), factor)
      assert largest_difference(state.head, after.head) == 0
      features = features_of(replay.to_float(after.inversion.buffer.images[0, :6]))
      seen = projected(jax.tree.map(np.asarray, state.head), features)
      alike.append((seen @ seen.T)[~np.eye(6, dtype=bool)].mean())
      contrast.append(metrics['contrast'])
    np.testing.assert_allclose(contrast[0][0], contrast[1][0], rtol=1e-5)
    assert contrast[0][-1] < 0.8 * contrast[1][-1]
    assert alike[0] < alike[1] - 0.1


def test_two_tasks_have_a_bank_each_and_share_the_head(x64):
  networks = toys.float64(toys.teacher()), toys.float64(toys.student())
  whole = cmi(num_tasks=2, bank_size=18)
  state = toys.jit(whole.init)(jax.random.key(0), networks[0])
  assert state.bank.shape == (2, 9, 2, 9)
  with jax.debug_key_reuse(False):
    together, metrics = toys.jit(whole.synthesize)(state, jax.random.key(5), *networks)
    found = one_by_one(cmi(), 2, networks)
  states = [state for state, _ in found]
  mean = lambda *leaves: np.mean(leaves, 0).astype(leaves[0].dtype)
  assert_close(together.head, jax.tree.map(mean, *(state.head for state in states)), rtol=1e-9)
  assert_close(
      together.head_opt_state, jax.tree.map(mean, *(state.head_opt_state for state in states)),
      rtol=1e-9)
  assert largest_difference(states[0].head, states[1].head) > 1e-4
  assert count(together) == 2
  assert count(together).dtype == jnp.int32
  assert_close(metrics, jax.tree.map(mean, *(metrics for _, metrics in found)), rtol=1e-9)
  for stripe, state in enumerate(states):
    assert_close(together.bank[stripe], state.bank[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(
        together.inversion.buffer.images[stripe, :4], state.inversion.buffer.images[0, :4])
  assert largest_difference(together.bank[0], together.bank[1]) > 1e-3


@pytest.mark.exhaustive
def test_four_devices_equal_four_tasks(x64):
  """Through two calls, so that each draws from its own bank."""
  networks = toys.float64(toys.teacher()), toys.float64(toys.student())
  create = lambda num_tasks, axis: cmi(
      num_tasks=num_tasks, axis=axis, capacity=8 * num_tasks, sample_batch_size=num_tasks,
      bank_size=7 * num_tasks, task_map='map', augment=augment.flip)
  (state, metrics), expected = (on_devices(create, networks, size) for size in (4, 1))
  assert_close((state, metrics), expected, rtol=1e-8, atol=1e-10)
  assert (int(state.size), count(state).dtype) == (7, np.dtype('int32'))


def test_feature_layers_are_chosen_by_path():
  sizes = {layers: jax.eval_shape(
               cmi(feature_layers=layers).init, jax.random.key(0), toys.teacher()).bank.shape[-1]
           for layers in (None, ('bn1',), ('bn2',), ('bn2', 'bn1'))}
  assert sizes == {None: 9, ('bn1',): 3, ('bn2',): 6, ('bn2', 'bn1'): 9}


def test_a_teacher_without_batch_norm_has_no_features():
  teacher = toys.teacher_without_batch_norm()
  with pytest.raises(
      ValueError, match=r'feature_layers has \[\], must be batch norms of the teacher: \[\]'):
    abstract_call(cmi(factors=Factors(one_hot=1.0, contrast=0.8)), teacher, None)
  _, metrics = abstract_call(cmi(factors=Factors(one_hot=1.0)), teacher, None)
  assert set(metrics) == {'loss', 'one_hot'}


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(bank_size=4), 'bank_size is 4, must be above 4, the images of one call'),
    (dict(bank_size=8, num_tasks=2, capacity=8),
     'bank_size is 8, must be above 8, the images of one call'),
    (dict(num_negatives=10), r'num_negatives is 10, must be in 1..9, the bank of a task'),
    (dict(num_negatives=0), 'num_negatives is 0'),
    (dict(bank_size=9, num_tasks=2, capacity=8),
     r'bank_size is 9, must be a positive multiple of 2'),
    (dict(capacity=13, num_tasks=4, sample_batch_size=8, bank_size=24),
     'capacity is 13, must be a positive multiple of 4'),
    (dict(factors=Factors(contrast=-1.0)), 'Factor contrast is -1.0'),
    (dict(meta='anew'), r"meta is 'anew', must be one of \('fomaml', "),
    (dict(banksize=3), "Unknown argument of cmi 'banksize'. Did you mean 'bank_size'")])
def test_bad_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    cmi(**changes)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(feature_layers=('bn7',)),
     r"feature_layers has \['bn7'\], must be batch norms of .*: \['bn1', 'bn2'\]"),
    (dict(feature_layers=()), 'feature_layers has '),
    (dict(task=tasks.classification(7)), 'The task has 7 classes, must have 5')])
def test_bad_numbers_are_named_at_init(changes, message):
  with pytest.raises(ValueError, match=message):
    abstract_call(cmi(**changes), toys.teacher(), toys.student())
