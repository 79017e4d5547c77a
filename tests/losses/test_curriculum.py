"""Self-paced weights and their loss: tables, brute force, and the bound that both rest on."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.losses import curriculum, divergence

CHECK = hypothesis.settings(derandomize=True, deadline=None, max_examples=60)
LOSSES = st.floats(0, 30)
THRESHOLDS = st.floats(0.05, 20)
KINDS = st.sampled_from(curriculum.KINDS)


def weights(*inputs):
  return np.asarray(curriculum.self_paced_weights(*inputs))


def robust_loss(losses, threshold, kind='log'):
  """Integral of the weights from 0 to l: the loss that a student minimizes in effect. Concave."""
  if kind == 'hard':
    return jnp.minimum(losses, threshold)
  if kind == 'soft':
    within = jnp.minimum(losses, threshold)
    return within - within**2 / (2 * threshold)
  # Further up it is at its bound, and the difference below would be pure rounding.
  within = jnp.minimum(losses, threshold + 50)
  rise = jax.nn.softplus(within - threshold) - jax.nn.softplus(-threshold)
  return (1 + jnp.exp(-threshold)) * (within - rise)


def robust(*inputs):
  return np.asarray(robust_loss(*inputs))


@pytest.mark.parametrize(('threshold', 'expected', 'at_one', 'bound'), [
    (1.0, (0.8514, 0.6839, 0.3679, 0.0649, 0.0012), 0.8482, 1.796),
    (2.0, (0.9282, 0.8300, 0.5677, 0.1353, 0.0028), 0.9238, 2.415),
    (4.2, (0.9905, 0.9752, 0.9137, 0.5581, 0.0222), 0.9896, 4.278),
    (12.0, (1.000, 1.000, 1.000, 0.9997, 0.9820), 1.000, 12.00)])
def test_the_table_of_log(threshold, expected, at_one, bound):
  losses = jnp.array([0.5, 1.0, 2.0, 4.0, 8.0])
  np.testing.assert_allclose(weights(losses, threshold), expected, atol=6e-5)
  np.testing.assert_allclose(robust(jnp.float32(1.0), threshold), at_one, atol=6e-5)
  np.testing.assert_allclose(robust(jnp.float32(200.0), threshold), bound, rtol=4e-4)


def test_tables_of_soft_and_hard():
  losses = jnp.array([0.0, 0.5, 2.0, 2.5])
  np.testing.assert_allclose(weights(losses, 2.0, 'hard'), [1, 1, 0, 0])
  np.testing.assert_allclose(robust(losses, 2.0, 'hard'), [0, 0.5, 2, 2])
  np.testing.assert_allclose(weights(losses, 2.0, 'soft'), [1, 0.75, 0, 0])
  np.testing.assert_allclose(robust(losses, 2.0, 'soft'), [0, 0.4375, 1, 1])


def xlogx(x):
  return np.where(x > 0, x * np.log(np.maximum(x, 1e-300)), 0)


REGULARISERS = {
    'hard': lambda v, threshold: -threshold * v,
    'soft': lambda v, threshold: threshold * (v**2 / 2 - v),
    'log': lambda v, threshold: xlogx(1 + np.exp(-threshold) - v) + xlogx(v) - threshold * v}


@pytest.mark.parametrize('kind', curriculum.KINDS)
@pytest.mark.parametrize('threshold', [0.3, 2.0, 5.0])
def test_weights_are_minimisers(kind, threshold, x64):
  grid = np.linspace(0, 1, 20001)
  for loss in (0.0, 0.1, 0.29, 1.0, 1.99, 2.5, 4.9, 7.0):
    objective = lambda v, loss=loss: v * loss + REGULARISERS[kind](v, threshold)
    best = grid[np.argmin(objective(grid))]
    weight = weights(jnp.asarray(loss, float), threshold, kind)
    np.testing.assert_allclose(weight, best, atol=1e-4, err_msg=f'at {loss}')
    assert objective(weight) <= objective(best) + 1e-12


@CHECK
@hypothesis.given(loss=LOSSES, threshold=THRESHOLDS, kind=KINDS)
def test_the_robust_loss_has_the_weight_as_its_slope(loss, threshold, kind):
  hypothesis.assume(abs(loss - threshold) > 1e-3)  # The kink of 'hard'.
  hypothesis.assume(loss > 1e-4)
  with jax.enable_x64(True):
    ends = robust(jnp.array([loss - 1e-5, loss + 1e-5]), threshold, kind)
    slope = jax.grad(robust_loss)(loss, threshold, kind)
    expected = weights(jnp.asarray(loss), threshold, kind)
    np.testing.assert_allclose((ends[1] - ends[0]) / 2e-5, expected, atol=1e-6)
    np.testing.assert_allclose(slope, expected, rtol=1e-9, atol=1e-12)


@CHECK
@hypothesis.given(loss=LOSSES, other=LOSSES, threshold=THRESHOLDS, kind=KINDS)
def test_a_tangent_lies_above_the_robust_loss(loss, other, threshold, kind):
  """Concave, so that a step on the weighted loss is a step down on the robust one."""
  with jax.enable_x64(True):
    at, other_loss = jnp.asarray(loss, float), jnp.asarray(other, float)
    tangent = robust(at, threshold, kind) + weights(at, threshold, kind) * (other - loss)
    assert robust(other_loss, threshold, kind) <= tangent + 1e-9


@CHECK
@hypothesis.given(loss=LOSSES, other=LOSSES, threshold=THRESHOLDS, more=THRESHOLDS, kind=KINDS)
def test_weights_fall_with_the_loss_and_grow_with_the_threshold(loss, other, threshold, more, kind):
  low, high = sorted((loss, other))
  with jax.enable_x64(True):
    easy, hard = weights(jnp.array([low, high]), threshold, kind)
    assert 0 <= hard <= easy <= 1 + 1e-12
    assert weights(jnp.asarray(loss, float), threshold + more, kind) >= weights(
        jnp.asarray(loss, float), threshold, kind) - 1e-12
    np.testing.assert_allclose(weights(jnp.asarray(0.0), threshold, kind), 1, rtol=1e-12)


@pytest.mark.parametrize('kind', curriculum.KINDS)
def test_alternation_never_raises_the_robust_loss(kind, x64):
  """Weights in closed form, then the exact minimum of weighted squares, a weighted mean."""
  points, place = np.array([0.0, 0.1, -0.2, 0.3, 6.0, -7.0, 9.0]), 1.2
  losses = lambda x: jnp.asarray((x - points) ** 2 / 2)
  values = [robust(losses(place), 2.0, kind).sum()]
  for _ in range(30):
    v = weights(losses(place), 2.0, kind)
    place = (v * points).sum() / v.sum()
    values.append(robust(losses(place), 2.0, kind).sum())
  assert (np.diff(values) <= 1e-12).all()
  assert values[-1] < values[0] - 1
  assert abs(place) < 0.2  # Where the near ones are, whatever lies far off.


def student_gradient(threshold, kind):
  """Of the weighted mean loss of a student with these logits, weights held fixed."""
  student, teacher = jax.random.normal(jax.random.key(0), (2, 5, 7))

  def loss_fn(logits):
    losses = divergence.kl(logits, teacher, 4.0)
    weights = curriculum.self_paced_weights(losses, threshold, kind)
    return (jax.lax.stop_gradient(weights) * losses).mean()

  plain = lambda logits: divergence.kl(logits, teacher, 4.0).mean()
  return jax.grad(loss_fn)(student), jax.grad(plain)(student)


@pytest.mark.parametrize('kind', curriculum.KINDS)
@pytest.mark.parametrize('threshold', [1e6, np.inf])
def test_without_bound_it_is_plain_distillation(kind, threshold):
  weighted, plain = student_gradient(threshold, kind)
  np.testing.assert_allclose(weighted, plain, rtol=1e-5, atol=1e-7)
  losses = jnp.array([0.0, 1.0, 30.0])
  np.testing.assert_allclose(robust(losses, threshold, kind), losses, rtol=1e-4)


def test_hard_at_nothing_learns_nothing():
  weighted, plain = student_gradient(0.0, 'hard')
  assert not weighted.any()
  assert plain.any()


@pytest.mark.parametrize('kind', curriculum.KINDS)
def test_shapes_and_extremes(kind):
  losses = jnp.array([[0.0, 1e-8, 1.0], [50.0, 1e4, 3e38]])
  for function in (curriculum.self_paced_weights, robust_loss):
    values = function(losses, 3.0, kind)
    assert (values.shape, values.dtype) == (losses.shape, losses.dtype)
    assert np.isfinite(values).all()
  np.testing.assert_allclose(weights(losses, 3.0, kind)[1], [0, 0, 0], atol=1e-12)
  bound = {'hard': 3.0, 'soft': 1.5, 'log': (1 + np.exp(-3)) * np.log1p(np.exp(3))}[kind]
  np.testing.assert_allclose(robust(losses, 3.0, kind)[1], [bound] * 3, rtol=1e-3)


def test_an_unknown_kind_is_named():
  with pytest.raises(
      ValueError, match=r"kind is 'linear', must be one of \('log', 'soft', 'hard'\)"):
    curriculum.self_paced_weights(jnp.ones(3), 1.0, 'linear')
