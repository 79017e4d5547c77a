"""CuDFKD: its two dials from easy to hard, each by itself, and what is left of it without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from flax import traverse_util

from dfkd_jax import augment, distill, synth, tasks
from dfkd_jax.losses import curriculum
from dfkd_jax.synth import generators
from dfkd_jax.synth.methods import cu_dfkd
from dfkd_jax.synth.objective import Adversary
from dfkd_jax.synth.schedules import ramp

LATENTS = np.random.default_rng(1).normal(size=(4, 7)).astype(np.float32)
NUMBERS = dict(image_shape=toys.IMAGE, task=tasks.classification(toys.CLASSES), latent_dim=7,
               batch_size=4, sample_batch_size=6)
LOSSES = np.array([0.0, 0.4, 1.5, 1.9, 4.0, 9.0], np.float32)


def method(**changes):
  return synth.create('cu_dfkd', **{'generator': toys.generator(), **NUMBERS, **changes})


def of_dfq(**changes):
  return synth.create('dfq', **{'generator': toys.generator(), **NUMBERS, **changes})


@functools.cache
def start():
  # Make it here: a first call inside a traced program would keep tracers.
  toys.student()
  return toys.jit(method().init)(jax.random.key(0), toys.teacher())


def weights(made, student_step=0):
  """What a student's losses count at a step, and the state after."""
  state, found = made.weigh(
      start().replace(student_step=jnp.int32(student_step)), None, jnp.asarray(LOSSES))
  assert int(state.student_step) == student_step + 1
  return found


def published(epochs, first, slope, begin, end):
  """At the end of every epoch e with int(b E) < e < int(c E) the factor rises."""
  series, factor = [], first
  for epoch in range(epochs):
    series.append(factor)
    if int(begin * epochs) < epoch < int(end * epochs):
      factor += slope
  return series


@pytest.mark.parametrize(('epochs', 'first', 'slope', 'begin', 'end', 'last'), [
    (250, 0.0, 0.5, 0.25, 0.75, 62.0),
    (250, 0.5, 0.05, 0.25, 0.75, 6.7),
    (400, 0.0, 0.35, 0.2, 0.8, 83.7),
    (500, 0.0, 0.12, 0.2, 0.75, 32.9),
    (400, 1.0, 0.15, 0.2, 0.75, 33.9)])
def test_the_published_ramps(epochs, first, slope, begin, end, last):
  """At each of 40 calls an epoch."""
  series = published(epochs, first, slope, begin, end)
  schedule = ramp(first, slope, int(begin * epochs), int(end * epochs), every=40)
  found = np.asarray(jax.jit(schedule)(jnp.arange(40 * epochs))).reshape(epochs, 40)
  np.testing.assert_allclose(found, np.repeat(np.array(series)[:, None], 40, 1), rtol=1e-5)
  np.testing.assert_allclose(found[-1, -1], last, atol=0.06)


def test_when_the_first_ramp_rises_and_ends():
  schedule = ramp(0.0, 0.5, 62, 187)
  np.testing.assert_allclose(
      [float(schedule(epoch)) for epoch in (0, 62, 63, 64, 65)], [0, 0, 0, 0.5, 1.0])
  np.testing.assert_allclose(
      [float(schedule(epoch)) for epoch in (186, 187, 188, 249)], [61.5, 62, 62, 62])


@functools.cache
def ramped():
  """Ten calls of a fixed generator, two an epoch; and the program's number of compilations."""
  made = method(
      adversarial=ramp(0.25, 0.5, 0, 3, every=2), generator_lr=0.0,
      sample_latents=lambda *_: LATENTS)
  synthesize, state, losses = toys.jit(made.synthesize), start(), []
  for index in range(10):
    state, metrics = synthesize(state, jax.random.key(index), toys.teacher(), toys.student())
    losses.append(float(metrics['loss'][0]))
  return losses, metrics, synthesize._cache_size()


def test_the_ramp_is_the_factor_of_the_adversary():
  losses, metrics, compilations = ramped()
  fixed = metrics['batch_norm'] + metrics['one_hot'] + 20 * metrics['balance']
  expected = fixed + np.repeat([0.25, 0.25, 0.75, 1.25, 1.25], 2) * metrics['adversarial']
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert metrics['adversarial'][0] < -1e-3
  assert compilations == 1


def test_terms_by_hand():
  """Balance at the student's temperature; 9 times the divergence at 3, where both agree."""

  @toys.jit
  def answers(params):
    images = generators.render(toys.generator(), params, LATENTS)
    return toys.teacher()(images).logits, toys.student()(images).logits

  wanted, answer = answers(start().online.params)
  mean = jax.nn.softmax(wanted / 20).mean(0)
  p, q = jax.nn.softmax(wanted / 3), jax.nn.softmax(answer / 3)
  agree = wanted.argmax(1) == answer.argmax(1)
  _, metrics, _ = ramped()
  np.testing.assert_allclose(metrics['balance'], [(mean * np.log(mean)).sum()], rtol=1e-5)
  apart = 9 * (p * (np.log(p) - np.log(q))).sum(1) * agree
  np.testing.assert_allclose(metrics['adversarial'], [-apart.mean()], rtol=1e-3)


@pytest.mark.parametrize(('first', 'growth', 'steps', 'last'), [
    (2.0, 1e-4, 100_000, 12.0), (1.0, 2e-5, 160_000, 4.2), (1.0, 2e-5, 200_000, 5.0)])
def test_the_published_thresholds(first, growth, steps, last):
  made = method(threshold_start=first, threshold_growth=growth)
  for step, threshold in ((0, first), (steps // 2, (first + last) / 2), (steps, last)):
    expected = curriculum.self_paced_weights(jnp.asarray(LOSSES), threshold)
    np.testing.assert_allclose(weights(made, step), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('kind', curriculum.KINDS)
def test_thresholds_grow_with_the_students_steps(kind):
  made = method(curriculum_kind=kind, threshold_start=1.0, threshold_growth=0.75)
  state, before = start(), np.zeros(6)
  for step in range(4):
    state, found = made.weigh(state, None, jnp.asarray(LOSSES))
    expected = curriculum.self_paced_weights(jnp.asarray(LOSSES), 1.0 + 0.75 * step, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (np.asarray(found) >= before - 1e-6).all()
    before = np.asarray(found)
  assert int(state.student_step) == 4
  np.testing.assert_array_equal(state.online.step, 0)
  assert 0 <= before.min() < 0.5 < 0.99 < before.max()  # Some are still too hard.


def test_a_batch_has_one_weight():
  found = weights(method(per='batch'))
  expected = curriculum.self_paced_weights(jnp.float32(LOSSES.mean()), 2.0)
  np.testing.assert_allclose(found, [expected] * 6, rtol=1e-6)
  assert len(set(weights(method()).tolist())) == 6


@pytest.mark.parametrize('per', cu_dfkd.PER)
def test_weights_on_several_devices_are_those_on_one(per):
  one = weights(method(per=per))
  made = method(per=per, axis='devices')
  state, spread = jax.vmap(lambda losses: made.weigh(start(), None, losses), axis_name='devices')(
      jnp.asarray(LOSSES).reshape(3, 2))
  np.testing.assert_allclose(spread.reshape(6), one, rtol=1e-6)
  np.testing.assert_array_equal(state.student_step, [1, 1, 1])


def test_what_is_too_hard_teaches_nothing():
  """In the student's loop: a threshold below all losses stops it; one above all teaches plainly."""
  tx = optax.sgd(0.1)
  student = distill.init(toys.student(), tx)

  @toys.jit
  def taught(state):
    run = lambda **changes: distill.distill(
        student, state, jax.random.key(3), toys.teacher(), synthesizer=method(**changes), tx=tx,
        num_steps=3, augment=augment.identity)[:2]
    return (run(curriculum_kind='hard', threshold_start=1e-9, threshold_growth=0.0),
            run(threshold_start=1e6), run(curriculum_kind=None))

  with jax.debug_key_reuse(False):  # The same samples for all three.
    (still, state), (easy, _), (plain, _) = taught(start())
  assert int(state.student_step) == 3
  jax.tree.map(np.testing.assert_array_equal, still.network.params, student.network.params)
  moved = [jax.tree.map(jnp.subtract, of.network.params, student.network.params)
           for of in (easy, plain)]
  # Relative to a step; 1e-4 of it is rounding of the parameters.
  assert max(toys.distances(*moved).values()) < 1e-3
  assert min(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(moved[1])) > 1e-5


def lowered(function, *inputs):
  """What is compiled, as text."""
  return jax.jit(function).lower(
      *inputs, jax.random.key(1), toys.teacher(), toys.student()).as_text()


def program(made):
  """The generator's half of a call, from the state that DFQ has."""

  def synthesize(state, *inputs):
    state, metrics = made.synthesize(cu_dfkd.State(state, jnp.int32(0)), *inputs)
    return state.online, metrics

  return lowered(synthesize, start().online)


def test_without_dials_it_is_dfq():
  """Of matching numbers and adversary: the same programs, not only the same results."""
  matching = dict(adam_b1=0.5, adam_b2=0.999, balance_temperature=1.0)
  for adversary in (Adversary('kl', 3.0, True), Adversary(masked=False)):
    found = program(method(curriculum_kind=None, adversary=adversary, **matching))
    assert found == lowered(of_dfq(adversary=adversary).synthesize, start().online)
  assert found != program(method(
      curriculum_kind=None, adversary=adversary, **{**matching, 'adam_b2': 0.99}))
  np.testing.assert_array_equal(weights(method(curriculum_kind=None)), np.ones(6))
  key = lambda: jax.random.key(7)
  state, other = (toys.jit(made.init)(key(), toys.teacher())
                  for made in (method(**matching), of_dfq()))
  jax.tree.map(np.testing.assert_array_equal, state.online, other)
  draw = lambda made, of: toys.jit(made.sample)(of, key()).images
  np.testing.assert_array_equal(draw(method(), state), draw(of_dfq(), other))


def test_a_ramp_that_stays_where_it_is_changes_nothing():
  """The factor 1 throughout, as `factors` has it."""
  call = lambda made: toys.jit(made.synthesize)(
      start(), jax.random.key(1), toys.teacher(), toys.student())
  found, expected = call(method(adversarial=ramp(1.0, 0.0, 0, 1))), call(method())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, expected)


def test_the_dials_are_independent():
  schedule = ramp(0.0, 0.5, 0, 3)
  with_ramp, without = program(method(adversarial=schedule)), program(method())
  assert with_ramp != without
  assert program(method(adversarial=schedule, curriculum_kind=None)) == with_ramp
  assert program(method(curriculum_kind=None)) == without
  np.testing.assert_array_equal(weights(method(adversarial=schedule)), weights(method()))
  np.testing.assert_array_equal(
      weights(method(adversarial=schedule, curriculum_kind=None)), np.ones(6))


def test_the_generator_starts_from_small_normal_weights():
  made = method(generator=toys.generator(width=8), init_std=0.02)
  state = toys.jit(made.init)(jax.random.key(0), toys.teacher()).online
  for path, leaf in traverse_util.flatten_dict(state.params, sep='/').items():
    if path.endswith('kernel'):
      np.testing.assert_allclose(np.std(leaf), 0.02, rtol=0.15)
    elif path.endswith('scale'):
      assert 0 < np.abs(leaf - 1).max() < 0.1
    else:
      assert not leaf.any()
  for stats in state.batch_stats.values():
    assert not stats['mean'].any()
    np.testing.assert_array_equal(stats['var'], np.ones(len(stats['var'])))


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(curriculum_kind='linear'),
     r"curriculum_kind is 'linear', must be None or one of \('log', 'soft', 'hard'\)"),
    (dict(per='pixel'), r"per is 'pixel', must be one of \('sample', 'batch'\)"),
    (dict(threshold_start=0.0), 'threshold_start is 0.0, must be above 0'),
    (dict(threshold_growth=-1e-4), 'threshold_growth -0.0001, at least 0'),
    (dict(init_std=0.0), 'init_std is 0.0, must be above 0, or None'),
    (dict(lambda_0=2.0), "Unknown argument of cu_dfkd 'lambda_0'")])
def test_bad_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    method(**changes)
