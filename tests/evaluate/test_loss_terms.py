"""What is said of a teacher before anything is spent on it, and what is refused."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs
import toys

from dfkd_jax import models, tasks, train, weights
from dfkd_jax.config import build, build_method
from dfkd_jax.config.records import resolve
from dfkd_jax.evaluate import loss_terms
from dfkd_jax.jobs import preflight
from dfkd_jax.losses import inversion
from dfkd_jax.synth import Factors, objective
from dfkd_jax.types import Moments

FACTORS = Factors(one_hot=0.5, batch_norm=2.0, relative_batch_norm=1.0, adversarial=1.0,
                  total_variation=0.1)


def measured(teacher, factors=FACTORS, generator=None, batch=6):
  return loss_terms.measure(
      jax.random.key(3), teacher, toys.student(), generator=generator, latent_shape=(batch, 7),
      image_shape=toys.IMAGE, task=tasks.classification(toys.CLASSES), factors=factors)


@pytest.fixture(scope='module')
def of_toy():
  return measured(toys.teacher(), generator=toys.generator())


def test_values_and_pulls_are_those_of_the_terms_alone():
  """Of noise, which needs no generator."""
  found, teacher = measured(toys.teacher()), toys.teacher()
  key_noise, _, _, key_labels = jax.random.split(jax.random.key(3), 4)
  images = jax.random.uniform(key_noise, (6, *toys.IMAGE))
  labels = tasks.classification(toys.CLASSES).sample_labels(key_labels, 6, None)
  by_hand = {
      'one_hot': lambda x: inversion.one_hot(teacher(x).logits, labels).mean(),
      'batch_norm': lambda x: inversion.batch_norm(teacher(x).moments, teacher.running()),
      'total_variation': lambda x: inversion.total_variation(x).mean()}
  for name, term in by_hand.items():
    value, gradient = toys.jit(jax.value_and_grad(term))(images)
    np.testing.assert_allclose(found.values[name], value, rtol=1e-5)
    np.testing.assert_allclose(found.gradient_norms[name], np.linalg.norm(gradient), rtol=1e-4)
  logits = np.asarray(teacher(images).logits)
  np.testing.assert_allclose(found.noise.spread, np.sqrt(logits.var(0).mean()), rtol=1e-4)
  assert found.noise.classes == len(set(logits.argmax(-1)))
  np.testing.assert_allclose(sum(found.layers.values()), found.values['batch_norm'], rtol=1e-5)


def with_pulls(one_hot, batch_norm):
  sight = loss_terms.LogitStats(1.0, 1.0, 0.5, 3.0, True)
  return loss_terms.Measurement(
      sight, sight, {}, {'one_hot': one_hot, 'batch_norm': batch_norm, 'total_variation': 4.0}, {})


@pytest.mark.parametrize(('batch_norm', 'momentum', 'expected'), [
    (1.0, 0.0, None), (1.0, 0.9, None), (3000.0, 0.0, 3.3e-4), (3000.0, 0.9, 3.3e-3),
    (1e-3, 0.0, 1e3)])
def test_a_moments_term_far_from_balance_gets_a_factor_suggested(batch_norm, momentum, expected):
  factors = Factors(one_hot=0.5, batch_norm=2.0)
  verdict = loss_terms.suggest_factors(with_pulls(4.0, batch_norm), toys.teacher(), factors,
                                       momentum=momentum)
  assert verdict.factors == factors  # A suggestion is not taken unasked.
  assert verdict.suggested.get('batch_norm') == (None if expected is None
                                                 else pytest.approx(expected, rel=0.05))
  if expected is not None:
    ratio = verdict.suggested['batch_norm'] * (1 - momentum) * batch_norm / (0.5 * 4.0)
    assert ratio == pytest.approx(loss_terms.TARGET_RATIO, rel=0.05)
    assert f'--config.factors.batch_norm={expected:.2g}' in verdict.notes[0]


def suggest(network, factors=FACTORS):
  without = {} if network.running() else {'batch_norm': 0.0, 'relative_batch_norm': 0.0}
  return loss_terms.suggest_factors(
      measured(network, factors._replace(**without)), network, factors)


def changed(collection, change):
  """The toy teacher with other variables."""
  return toys.teacher().replace(
      **{collection: jax.tree.map(change, getattr(toys.teacher(), collection))})


def test_refuses_what_offers_nothing():
  assert suggest(toys.teacher())
  with pytest.raises(ValueError, match='are not finite: weights or preprocessing'):
    suggest(changed('params', lambda leaf: leaf * jnp.nan))
  alike = changed('params',
                  lambda leaf: leaf * (leaf.ndim == 1))  # Biases alone, whatever the image.
  with pytest.raises(ValueError, match='predicts the same for all images'):
    suggest(alike)


def test_a_teacher_without_moments_is_refused_by_name():
  assert loss_terms.missing_moments(toys.teacher()) is None
  plain = toys.teacher_without_batch_norm()
  with pytest.raises(
      ValueError, match=r'\Afactors.batch_norm is 2.0, must be 0: the teacher has no batch norm'):
    suggest(plain)
  fresh = models.create_network(toys.teacher().module, jax.random.key(0), toys.IMAGE)
  assert loss_terms.missing_moments(
      fresh) == 'the running moments of all 2 batch norms are 0 and 1, as before any training'
  for broken in (Moments(np.full(3, np.nan), np.ones(3)), Moments(np.zeros(3), -np.ones(3))):
    stats = dict(fresh.batch_stats) | {'bn1': broken._asdict()}
    assert "the running moments of 'bn1' are not finite" in loss_terms.missing_moments(
        fresh.replace(batch_stats=stats))


def test_goes_on_by_smoothness_where_that_is_allowed():
  plain = toys.teacher_without_batch_norm()
  wanted = Factors(one_hot=0.5, batch_norm=2.0, adversarial=1.0)
  found = measured(plain, Factors(one_hot=0.5, adversarial=1.0, total_variation=1.0))
  verdict = loss_terms.suggest_factors(found, plain, wanted, fallback=True)
  assert (verdict.factors.batch_norm, verdict.factors.one_hot,
          verdict.factors.adversarial) == (0.0, 0.5, 1.0)
  pull = verdict.factors.total_variation * found.gradient_norms['total_variation']
  assert pull == pytest.approx(loss_terms.SMOOTHNESS_RATIO * 0.5 * found.gradient_norms['one_hot'],
                               rel=0.1)
  assert 'goes on without batch_norm' in verdict.notes[0]
  own = loss_terms.suggest_factors(found, plain, wanted._replace(total_variation=3.0),
                                   fallback=True)
  assert own.factors.total_variation == 3.0


def test_smoothness_without_a_gradient_gets_a_factor_too():
  norms = {'one_hot': 4.0, 'total_variation': 0.0}
  found = with_pulls(4.0, 1.0)._replace(gradient_norms=norms)
  verdict = loss_terms.suggest_factors(
      found, toys.teacher_without_batch_norm(), Factors(one_hot=0.5, batch_norm=2.0), fallback=True)
  assert verdict.factors.total_variation == 1e-3


def test_dense_teachers_have_no_class_to_ask_for():
  found = loss_terms.measure(
      jax.random.key(0), toys.dense_teacher(), None, generator=None, latent_shape=(3,),
      image_shape=toys.IMAGE,
      task=tasks.segmentation(toys.CLASSES), factors=Factors(one_hot=1.0, batch_norm=1.0))
  assert set(found.values) == {'one_hot', 'batch_norm'}
  assert all(np.isfinite(value) for value in found.values.values())


def test_the_lines_say_each_term_and_the_largest_layers(of_toy):
  verdict = loss_terms.suggest_factors(of_toy, toys.teacher(), FACTORS)
  text = '\n'.join(preflight.lines(of_toy, verdict))
  for name in ('one_hot', 'batch_norm', 'relative_batch_norm', 'adversarial', 'total_variation'):
    assert f'{float(of_toy.values[name]):12.4g}' in text
  assert 'of 2 layers' in text


def check(tmp_path, **changes):
  """The job by way of `train.run`: what it returns and what it prints."""
  printed = io.StringIO()
  with contextlib.redirect_stderr(printed), toy_runs.quick():
    found = train.run(toy_runs.config(job='check', **changes), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()  # A look leaves nothing behind.
  return found, printed.getvalue()


def test_the_job_prints_and_writes_nothing(tmp_path):
  found, printed = check(tmp_path, dataset__name=None)
  assert found['values']['batch_norm'] > 0
  assert 'term, at the start' in printed


def test_the_job_needs_no_student_and_no_data(tmp_path):
  found, _ = check(tmp_path, dataset__name=None, student__name=None)
  assert 'adversarial' not in found['values']


def test_factors_of_a_config_are_read(tmp_path):
  found, printed = check(tmp_path, factors__batch_norm=1e6)
  assert found['suggested']['batch_norm'] < 1e5
  assert '--config.factors.batch_norm=' in printed
  config = toy_runs.config()
  assert build_method.synthesizer(resolve(config).method, 1, objective.Factors(one_hot=1.0))(None)


def moments_of_init(tmp_path):
  """Weights whose running moments no training has moved."""
  network = build.fresh_network(resolve(toy_runs.config()).teacher, jax.random.key(3))
  path = tmp_path / 'fresh.safetensors'
  weights.save_safetensors(path, {'params': network.params, 'batch_stats': network.batch_stats})
  return str(path)


def test_a_file_without_moments_is_refused_or_inverted_by_smoothness(tmp_path):
  source = moments_of_init(tmp_path)
  with pytest.raises(ValueError, match=r'teacher\.source is .* 0 and 1, as before any training'):
    check(tmp_path, teacher__source=source)
  found, printed = check(tmp_path, teacher__source=source, preflight__fallback=True)
  assert found['factors']['batch_norm'] == 0
  assert found['factors']['total_variation'] > 0
  assert 'goes on without batch_norm' in printed
  with toy_runs.quick():
    summary = train.run(
        toy_runs.config(teacher__source=source, preflight__enabled=True,
                        preflight__fallback=True, distill__rounds=2),
        tmp_path / 'whole')
  assert summary['preflight']['factors'] == found['factors']


def test_the_job_needs_a_method_and_says_so(tmp_path):
  with pytest.raises(ValueError, match=r'method\.name is None, must be one of'):
    check(tmp_path, method__name=None)


def test_terms_that_need_a_student_are_named(tmp_path):
  with pytest.raises(ValueError, match=r'student\.name is None'):
    check(tmp_path, student__name=None, factors__one_hot=0.0, factors__batch_norm=0.0)
