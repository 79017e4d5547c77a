"""DAFL, ZSKT, DFQ and DFAD: their special cases, their adversaries, and the refused options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from dfkd_jax import models, synth, tasks
from dfkd_jax.synth import Factors, objective
from dfkd_jax.synth.objective import Adversary


def created(name, **changes):
  return synth.create(name, **{
      'generator': toys.generator(), 'image_shape': toys.IMAGE,
      'task': tasks.classification(toys.CLASSES), 'latent_dim': 7, 'batch_size': 4,
      'sample_batch_size': 6, **changes})


@functools.cache
def start():
  """The first state of all these methods: it depends on the generator alone."""
  # Made here: a first call while a trace runs would cache tracers.
  toys.student()
  return toys.jit(created('dafl').init)(jax.random.key(0), toys.teacher())


def gradient(state):
  """From Adam's first moment, which after one update of a fresh optimizer is 1 - b1 = 1/2 of it."""
  return jax.tree.map(lambda mu: 2 * mu, optax.tree_utils.tree_get(state.opt_state, 'mu'))


def default(name, argument):
  return synth.defaults(name)[argument]


def lowered(made):
  """What is compiled for a call, as text."""
  inputs = start(), jax.random.key(1), toys.teacher(), toys.student()
  return jax.jit(made.synthesize).lower(*inputs).as_text()


def test_dfq_without_its_two_terms_is_dafl():
  """The same program, not only the same numbers."""
  factors = default('dfq', 'factors')._replace(batch_norm=0.0, adversarial=0.0, activation=1e-3)
  program = lowered(created('dafl'))
  assert lowered(created('dfq', factors=factors)) == program
  assert lowered(created('dfq', factors=factors._replace(activation=2e-3))) != program


def test_dfq_of_the_adversary_alone_is_zskt_or_dfad():
  alone = Factors(adversarial=1.0)
  of_kl, of_l1 = lowered(created('zskt')), lowered(created('dfad'))
  assert lowered(created('dfq', factors=alone)) == of_kl
  assert lowered(created('dfq', factors=alone, adversary=Adversary('l1', masked=False))) == of_l1
  assert of_kl != of_l1


def test_dafl_asks_no_student():
  made = created('dafl')
  state = jax.eval_shape(made.init, jax.random.key(0), toys.teacher())
  jax.eval_shape(
      lambda *inputs: made.synthesize(*inputs, None), state, jax.random.key(1), toys.teacher())


@pytest.mark.parametrize('name', ['zskt', 'dfad', 'dfq'])
def test_the_adversary_needs_a_student(name):
  made = created(name)
  state = jax.eval_shape(made.init, jax.random.key(0), toys.teacher())
  with pytest.raises(ValueError, match='student is None'):
    jax.eval_shape(
        lambda *inputs: made.synthesize(*inputs, None), state, jax.random.key(1), toys.teacher())


def test_the_student_is_the_adversary():
  """A random one gives the generator something to learn; the teacher in its place gives nothing."""
  synthesize = toys.jit(created('zskt').synthesize)
  random = models.create_network(
      toys.teacher().module, jax.random.key(8), toys.IMAGE, mean=toys.MEAN, std=toys.STD)
  (found, metrics), (nothing, none) = (
      synthesize(start(), jax.random.key(1), toys.teacher(), student)
      for student in (random, toys.teacher()))
  assert metrics['loss'][0] < -1e-2
  assert min(float(jnp.linalg.norm(leaf))
             for leaf in jax.tree.leaves(gradient(found)['Conv_0'])) > 1e-3
  np.testing.assert_allclose(none['loss'], [0], atol=1e-7)
  assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient(nothing))) < 1e-6
  assert synthesize._cache_size() == 1


@pytest.mark.parametrize('name', ['zskt', 'dfad'])
def test_the_generator_seeks_disagreement(name):
  """The adversary alone drives a fixed student and a fixed teacher apart from call to call."""
  state, losses = start(), []
  synthesize = toys.jit(created(name, generator_lr=1e-2, batch_size=16).synthesize)
  for index in range(30):
    state, metrics = synthesize(state, jax.random.key(index), toys.teacher(), toys.student())
    losses.append(float(metrics['loss'][0]))
  assert np.mean(losses[-5:]) < 1.3 * np.mean(losses[:5]) < 0


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(sample_by='evaluation'),
     r"sample_by is 'evaluation', must be one of \('running', 'batch'\)"),
    (dict(num_steps=0), 'num_steps is 0, must be at least 1'),
    (dict(balance_temperature=0.0), 'balance_temperature is 0.0, must be above 0'),
    (dict(factors=Factors(balance=-20.0)), 'Factor balance is -20.0'),
    (dict(sample_batch_size=7, num_tasks=3),
     r'sample_batch_size is 7, must be a positive multiple of 3'),
    (dict(task_map='scan'), "task_map is 'scan'"),
    (dict(lr_g=1e-3), "Unknown argument of dfq 'lr_g'")])
def test_bad_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    created('dfq', **changes)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(image_shape=(12, 12, 3)), r'image_shape is \(12, 12, 3\), must be \(12, 8, 3\)'),
    (dict(task=tasks.classification(4)), 'The task has 4 classes, must have 5')])
def test_what_does_not_fit_the_teacher_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(created('dfq', **changes).init, jax.random.key(0), toys.teacher())


def test_an_unknown_divergence_is_named():
  made = created('dfq', adversary=Adversary('l3'))
  state = jax.eval_shape(made.init, jax.random.key(0), toys.teacher())
  with pytest.raises(ValueError, match="divergence is 'l3'"):
    jax.eval_shape(made.synthesize, state, jax.random.key(1), toys.teacher(), toys.student())


def test_a_teacher_without_batch_norm_is_refused():
  teacher = toys.teacher_without_batch_norm()
  with pytest.raises(ValueError, match='The teacher has no BatchNorm'):
    jax.eval_shape(created('dfq').init, jax.random.key(0), teacher)
  jax.eval_shape(created('zskt').init, jax.random.key(0), teacher)


def test_in_train_mode_the_adversary_takes_the_moments_of_the_batch():
  """The generator's loss is that of batch moments; the student itself is not changed."""
  images = jax.random.uniform(jax.random.key(4), (6, *toys.IMAGE))
  outputs, student = toys.teacher()(images), toys.student()
  found = {}
  for train_mode in (False, True):
    adversary = Adversary('l1', masked=False, train_mode=train_mode)
    terms = objective.terms(
        Factors(adversarial=1.0), outputs, images, outputs.logits.argmax(-1),
        teacher=toys.teacher(), student=student, adversary=adversary)
    found[train_mode] = float(terms['adversarial'].mean())
    logits = student.forward(images, train=train_mode)[0].logits
    np.testing.assert_allclose(
        found[train_mode], -np.abs(logits - outputs.logits).mean(), rtol=1e-5)
  assert abs(found[True] - found[False]) > 1e-3
