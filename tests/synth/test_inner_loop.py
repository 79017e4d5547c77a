"""The inner loop on problems solved by hand, and the weighted sum that it minimises."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from dfkd_jax import tasks
from dfkd_jax.losses import inversion
from dfkd_jax.synth import Factors, inner_loop, objective
from dfkd_jax.synth.inversion import InnerLoop
from dfkd_jax.synth.layout import Layout
from dfkd_jax.types import Moments, Outputs

TERMS = tuple(name for name in Factors._fields if name != 'contrast')  # Which is CMI's own.


def seen(x, **metrics):
  return inner_loop.StepOutput(kept={'images': 10 * x}, aux=x + 1, metrics=metrics)


def quadratic(x, key):
  """x^2: a step of SGD at rate 1/4 halves x."""
  del key
  return x**2, seen(x, double=2 * x)


def minimize(loss_fn, variables, num_steps=3, rate=0.25, keep='best'):
  tx = optax.sgd(rate)
  variables = jax.tree.map(jnp.asarray, variables)
  return jax.jit(lambda v: inner_loop.minimize(
      jax.random.key(0), loss_fn, v, tx.init(v), tx=tx, num_steps=num_steps, keep=keep))(variables)


def test_quadratic_by_hand():
  found = minimize(quadratic, 8.0)  # Visits 8, 4, 2 and ends at 1, which is never rendered.
  np.testing.assert_allclose(found.metrics['loss'], [64, 16, 4])
  np.testing.assert_allclose(found.metrics['double'], [16, 8, 4])
  assert float(found.variables) == 1
  assert float(found.loss) == 4
  assert float(found.kept['images']) == 20
  assert float(found.grads) == 16 + 8 + 4
  assert float(found.aux) == 3


def test_one_step_keeps_the_start():
  found = minimize(quadratic, 8.0, num_steps=1)
  assert (float(found.kept['images']), float(found.variables), float(found.grads)) == (80, 4, 16)


@pytest.mark.parametrize(('keep', 'images', 'loss'), [('best', 10, 1), ('last', 90, 81)])
def test_best_or_last_where_the_loss_rises(keep, images, loss):
  # At rate 2 each step makes x three times as large, of the other sign: 1, -3, 9.
  found = minimize(quadratic, 1.0, rate=2.0, keep=keep)
  assert (float(found.kept['images']), float(found.loss)) == (images, loss)
  assert float(found.aux) == 10  # Of the last step in either case.


def test_of_equal_losses_the_first_is_kept():
  flat = lambda x, key: (0 * x + 3, seen(jax.random.uniform(key)))
  found = minimize(flat, 1.0)
  first = jax.random.uniform(jax.random.split(jax.random.key(0), 3)[0])
  np.testing.assert_allclose(found.kept['images'], 10 * first)


def test_every_step_has_its_own_key():
  noisy = lambda x, key: (x**2, seen(x, drawn=jax.random.uniform(key)))
  drawn = np.asarray(minimize(noisy, 1.0, num_steps=5).metrics['drawn'])
  assert len(set(drawn.tolist())) == 5


def test_nan_is_never_chosen_after_the_first_step():
  turns_nan = lambda x, key: (jnp.where(x > 5, x, jnp.nan) * x, seen(x))
  found = minimize(turns_nan, 8.0)
  assert (float(found.kept['images']), float(found.loss)) == (80, 64)
  np.testing.assert_array_equal(np.isnan(found.metrics['loss']), [False, True, True])


def test_the_first_step_is_kept_where_none_is_finite():
  always_nan = lambda x, key: (x * jnp.nan, seen(jax.random.uniform(key)))
  found = minimize(always_nan, 8.0)
  first = jax.random.uniform(jax.random.split(jax.random.key(0), 3)[0])
  np.testing.assert_allclose(found.kept['images'], 10 * first)
  assert np.isnan(found.loss)


def test_variables_may_be_any_tree():
  loss_fn = lambda v, key: (v['a'] ** 2 + jnp.sum(v['b'][0] ** 2), seen(v['a']))
  found = minimize(loss_fn, {'a': 8.0, 'b': (jnp.array([4.0, -4.0]),)}, num_steps=2)
  np.testing.assert_allclose(found.grads['b'][0], [8 + 4, -8 - 4])
  np.testing.assert_allclose(found.variables['b'][0], [1, -1])


def test_optimizer_state_is_carried():
  tx = optax.sgd(0.25, momentum=0.5)  # By hand: traces 16 and 8 + 8, so 8 -> 4 -> 0.
  found = inner_loop.minimize(
      jax.random.key(0), quadratic, jnp.array(8.0), tx.init(jnp.array(8.0)), tx=tx, num_steps=2)
  assert float(found.variables) == 0
  assert float(jax.tree.leaves(found.opt_state)[0]) == 16


def test_project_follows_each_update():
  """At most 3: from 8 to 4 and back to 3, then to 1.5, which stays."""
  start, tx = jnp.array(8.0), optax.sgd(0.25)
  found = inner_loop.minimize(
      jax.random.key(0), quadratic, start, tx.init(start), tx=tx, num_steps=2,
      project=lambda x: jnp.minimum(x, 3))
  np.testing.assert_allclose(found.metrics['loss'], [64, 9])
  assert float(found.variables) == 1.5


def test_generator_and_latents_have_learning_rates_of_their_own():
  """Of gradients that do not change, Adam leaves the sign."""
  for latent_lr, latents in ((0.25, [3.5, -3.5]), (None, [3.0, -3.0])):
    tx = InnerLoop(generator_lr=0.5, latent_lr=latent_lr).optimizer()
    variables = {'latents': jnp.array([4.0, -4.0]), 'params': jnp.array(8.0)}
    state = tx.init(variables)
    for _ in range(2):
      updates, state = tx.update(
          {'params': jnp.array(7.0), 'latents': jnp.array([3.0, -3.0])}, state, variables)
      variables = optax.apply_updates(variables, updates)
    np.testing.assert_allclose(variables['params'], 7.0, rtol=1e-5)
    np.testing.assert_allclose(variables['latents'], latents, rtol=1e-5)


@pytest.mark.parametrize(('numbers', 'message'), [
    (dict(num_steps=0), 'num_steps is 0, must be at least 1'),
    (dict(keep='worst'), r"keep is 'worst', must be one of \('best', 'last'\)")])
def test_bad_numbers_are_named(numbers, message):
  with pytest.raises(ValueError, match=message):
    minimize(quadratic, 8.0, **numbers)


def test_task_map_is_checked():
  with pytest.raises(
      ValueError, match=r"task_map is 'pmap', must be one of \('auto', 'vmap', 'map'\)"):
    Layout(task_map='pmap')


@pytest.mark.parametrize('task_map', ['auto', 'vmap', 'map'])
@pytest.mark.parametrize('num_tasks', [1, 3])
def test_over_tasks_equals_a_python_loop(task_map, num_tasks):
  inputs = {'a': jnp.arange(2.0 * num_tasks).reshape(num_tasks, 2), 'b': jnp.arange(num_tasks)}
  function = lambda task: (task['a'] * task['b'], task['a'].sum())
  product, total = Layout(task_map=task_map).map(function, inputs)
  np.testing.assert_array_equal(
      product, [a * b for a, b in zip(inputs['a'], inputs['b'], strict=True)])
  np.testing.assert_array_equal(total, [a.sum() for a in inputs['a']])


@pytest.fixture(scope='module')
def scene():
  """Teacher, student, images, labels and the teacher's outputs."""
  teacher, student = toys.teacher(), toys.student()
  images = jax.random.uniform(jax.random.key(2), (6, *toys.IMAGE))
  labels = jnp.array([0, 1, 2, 3, 4, 0])
  return teacher, student, images, labels, toys.jit(lambda: teacher(images))()


def terms(scene, factors, **changes):
  teacher, student, images, labels, outputs = scene
  return objective.terms(
      factors, outputs, images, labels,
      **{'teacher': teacher, 'student': student, 'reduce': lambda t: t, **changes})


def test_total_is_the_weighted_sum_of_means(scene):
  factors = Factors(**{name: (i + 1) / 10 for i, name in enumerate(TERMS)})
  found = terms(scene, factors)
  teacher, student, images, labels, outputs = scene
  by_hand = {
      'one_hot': inversion.one_hot(outputs.logits, labels).mean(),
      'batch_norm': inversion.batch_norm(outputs.moments, teacher.running()),
      'adversarial': inversion.adversarial(student(images).logits, outputs.logits).mean(),
      'balance': inversion.balance(outputs.logits),
      'activation': inversion.activation(outputs.features).mean(),
      'total_variation': inversion.total_variation(images).mean(),
      'l2': inversion.l2(images),
      'student_batch_norm': -inversion.batch_norm(student(images).moments, student.running()),
      'relative_batch_norm': inversion.relative_batch_norm(outputs.moments, teacher.running())}
  total, means = objective.total(found, factors)
  assert found.keys() == means.keys() == by_hand.keys() == set(TERMS)
  for name in by_hand:
    np.testing.assert_allclose(means[name], by_hand[name], rtol=1e-6)
  weighted = [(i + 1) / 10 * by_hand[name] for i, name in enumerate(TERMS)]
  np.testing.assert_allclose(total, sum(weighted), rtol=1e-5)


@pytest.mark.parametrize('name', TERMS)
def test_a_factor_of_zero_computes_nothing(scene, name):
  everything = Factors(*[1.0] * len(Factors._fields))
  assert name not in terms(scene, everything._replace(**{name: 0.0}))
  assert list(terms(scene, Factors(**{name: 1.0}))) == [name]


def test_the_student_is_not_called_where_the_adversary_is_off(scene):
  def forward(images, train):
    raise AssertionError('called')

  student = SimpleNamespace(forward=forward)
  assert set(terms(scene, Factors(one_hot=1.0, batch_norm=1.0), student=student)) == {
      'one_hot', 'batch_norm'}
  with pytest.raises(AssertionError, match='called'):
    terms(scene, Factors(adversarial=1.0), student=student)


def test_a_traced_factor_is_active_and_may_be_zero(scene):
  total = jax.jit(lambda factor: objective.total(
      terms(scene, Factors(one_hot=1.0, adversarial=factor)),
      Factors(one_hot=1.0, adversarial=factor)))
  off, metrics = total(jnp.float32(0))
  np.testing.assert_allclose(off, metrics['one_hot'], rtol=1e-6)
  on, metrics = total(jnp.float32(2))
  np.testing.assert_allclose(on, metrics['one_hot'] + 2 * metrics['adversarial'], rtol=1e-6)


def test_the_adversary_needs_a_student(scene):
  with pytest.raises(ValueError, match='student is None, must be a Network'):
    terms(scene, Factors(adversarial=1.0), student=None)
  assert terms(scene, Factors(one_hot=1.0), student=None)


@pytest.mark.parametrize('name', Factors._fields)
@pytest.mark.parametrize('value', [-0.1, float('nan'), float('inf')])
def test_a_factor_below_zero_is_refused_by_name(name, value):
  with pytest.raises(
      ValueError, match=rf'Factor {name} is {value}, must be a finite number and at least 0'):
    Factors(**{name: value}).checked()


def test_a_term_that_nothing_computes_is_refused():
  factors = Factors(contrast=0.8)
  with pytest.raises(
      ValueError, match=r'Factor contrast is 0\.8, must be 0: this method has no such term'):
    factors.checked()
  assert factors.checked(own=('contrast',)) is factors


def test_checked_factors_come_back_as_they_are():
  # A trace does not know the value of an array.
  factors = Factors(one_hot=1, batch_norm=0.5, adversarial=jnp.float32(-1))
  assert factors.checked() is factors


def test_the_adversary_with_itself_gives_nothing_and_with_another_something(scene):
  """The published baselines handed the teacher over as its own student."""
  teacher, near, images, labels, _ = scene

  @toys.jit
  @jax.value_and_grad
  def term(images, student):
    found = objective.terms(
        Factors(adversarial=1.0), teacher(images), images, labels, teacher=teacher, student=student)
    return found['adversarial'].sum()

  value, grad = term(images, teacher)
  assert abs(float(value)) < 1e-5
  value_of_another, grad_of_another = term(images, near)
  assert float(value_of_another) < -1e-3
  assert np.abs(grad).max() < 1e-3 * np.abs(grad_of_another).max()


def test_smoothness_may_be_asked_of_other_pixels(scene):
  *_, images, _, _ = scene
  found = terms(scene, Factors(total_variation=1.0, l2=1.0), pixels=3 * images)
  np.testing.assert_allclose(
      found['total_variation'], 3 * inversion.total_variation(images), rtol=1e-5)
  np.testing.assert_allclose(found['l2'], 3 * inversion.l2(images), rtol=1e-5)


def test_past_moments_are_mixed_in(scene):
  teacher, *_, outputs = scene
  past = jax.tree.map(lambda leaf: 2 * leaf + 1, teacher.running())
  factors = Factors(batch_norm=1.0)
  found = terms(scene, factors, history=objective.History(past, 0.9))['batch_norm']
  mixed = jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, outputs.moments, past)
  by_hand = sum(
      np.linalg.norm(getattr(mixed[path], of) - getattr(teacher.running()[path], of))
      for path in mixed for of in Moments._fields)
  np.testing.assert_allclose(found, by_hand, rtol=1e-5)
  plain = terms(scene, factors)['batch_norm']
  np.testing.assert_allclose(
      terms(scene, factors, history=objective.History(past, 0.0))['batch_norm'], plain, rtol=1e-6)
  # A batch whose past is its own moments costs the same as without a past.
  np.testing.assert_allclose(
      terms(scene, factors, history=objective.History(outputs.moments, 0.9))['batch_norm'], plain,
      rtol=1e-5)


def test_momentum_scales_the_gradient(scene):
  """The moments that are matched change by a tenth of what the batch's do."""
  teacher, _, images, labels, outputs = scene

  def loss(moments, past, momentum):
    found = objective.terms(
        Factors(batch_norm=1.0), outputs._replace(moments=moments), images, labels, teacher=teacher,
        history=past and objective.History(past, momentum))
    return found['batch_norm']

  grads = jax.grad(loss)(outputs.moments, outputs.moments, 0.9)
  plain = jax.grad(loss)(outputs.moments, None, 0.0)
  for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(one, 0.1 * other, rtol=1e-5)


def test_moments_equal_to_the_running_ones_cost_nothing_and_give_no_nan(scene):
  teacher, _, images, labels, outputs = scene
  loss = lambda moments: objective.terms(
      Factors(batch_norm=1.0), outputs._replace(moments=moments), images, labels,
      teacher=teacher)['batch_norm']
  value, grads = jax.value_and_grad(loss)(teacher.running())
  assert float(value) == 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  off = lambda scale: jax.tree.map(
      lambda leaf: leaf + scale * jnp.arange(1.0, leaf.size + 1), teacher.running())
  np.testing.assert_allclose(loss(off(2.0)), 2 * loss(off(1.0)), rtol=1e-5)  # Un-squared.


def test_dense_predictions_are_reduced_to_one_loss_an_image(scene):
  """Logits of each pixel [B, H, W, K] go through the same terms."""
  teacher, _, images, _, _ = scene
  dense = jax.random.normal(jax.random.key(3), (6, 4, 3, toys.CLASSES))
  other = jax.random.normal(jax.random.key(4), (6, 4, 3, toys.CLASSES))
  blank = Outputs(logits=other, features=None, maps=(), moments={}, pooled={})
  task = tasks.segmentation(toys.CLASSES)
  student = SimpleNamespace(forward=lambda images, train: (blank, None))
  found = objective.terms(
      Factors(one_hot=1.0, adversarial=1.0), blank._replace(logits=dense), images,
      task.labels_from(dense, None), teacher=teacher, student=student, reduce=task.reduce)
  assert found['one_hot'].shape == found['adversarial'].shape == (6,)
  pixels = inversion.one_hot(dense.reshape(-1, toys.CLASSES), jnp.argmax(dense, -1).ravel())
  np.testing.assert_allclose(found['one_hot'], pixels.reshape(6, -1).mean(1), rtol=1e-5)
