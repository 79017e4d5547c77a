"""Attention transfer: values by hand, edges, and its part in the student's loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from dfkd_jax import augment, distill
from dfkd_jax.losses import divergence


def maps(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def test_attention_by_hand():
  pixels = [[[1.0, 1.0], [0.0, 2.0]], [[2.0, 2.0], [0.0, 0.0]]]
  attended = divergence.attention_map(jnp.array([pixels]))
  # Means of squares 1, 2, 4, 0.
  np.testing.assert_allclose(attended, [np.array([1, 2, 4, 0]) / np.sqrt(21)], rtol=1e-6)


def test_transfer_is_a_loop_over_images_and_stages():
  student = maps(0, 3, 5, 4, 2), maps(1, 3, 2, 3, 6)
  teacher = maps(2, 3, 5, 4, 7), maps(3, 3, 2, 3, 1)
  expected = []
  for image in range(3):
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
      a, b = ((np.asarray(of[image]) ** 2).mean(-1).ravel() for of in (ours, theirs))
      total += np.sqrt(((a / np.sqrt((a**2).sum()) - b / np.sqrt((b**2).sum())) ** 2).sum())
    expected.append(total)
  np.testing.assert_allclose(divergence.attention_transfer(student, teacher), expected, rtol=1e-5)


def test_scale_does_not_count_and_equal_maps_cost_nothing():
  ours, theirs = (maps(0, 3, 5, 4, 2),), (maps(2, 3, 5, 4, 7),)
  scaled = divergence.attention_transfer((3 * ours[0],), theirs)
  np.testing.assert_allclose(scaled, divergence.attention_transfer(ours, theirs), rtol=1e-5)
  np.testing.assert_array_equal(divergence.attention_transfer(ours, ours), np.zeros(3))


@pytest.mark.parametrize('student', [(jnp.zeros((2, 3, 4, 5)),), (maps(0, 2, 3, 4, 5),)])
def test_gradient_is_finite_at_dead_and_at_equal_maps(student):
  grads = jax.grad(lambda of: divergence.attention_transfer(of, (maps(0, 2, 3, 4, 5),)).sum())(
      student)
  assert np.isfinite(grads[0]).all()


@pytest.mark.parametrize('teacher', [(), (jnp.ones((2, 3, 5, 1)),), (jnp.ones((2, 3, 4, 1)),) * 2])
def test_other_stages_are_refused(teacher):
  with pytest.raises(ValueError, match=r'Stages of the student have \[\(3, 4\)\] pixels'):
    divergence.attention_transfer((jnp.ones((2, 3, 4, 6)),), teacher)


def test_the_students_loss_has_it_with_its_factor():
  """On the same samples, the losses of one step differ by the factor times the transfer."""
  method, tx = toys.fast_dfkd(num_steps=1), distill.coupled_sgd(0.1, 0.9, 0.0)
  teacher = toys.teacher()
  wider = jax.tree.map(lambda leaf: 1.3 * leaf, toys.student().params)
  student = distill.init(toys.student().replace(params=wider), tx)
  state = toys.jit(method.init)(jax.random.key(0), teacher)
  state, _ = toys.jit(method.synthesize)(state, jax.random.key(1), teacher, toys.student())

  def loss(factor):
    return toys.jit(lambda student, state, key: distill.distill(
        student, state, key, teacher, synthesizer=method, tx=tx, num_steps=1, temperature=4.0,
        augment=augment.identity, attention_factor=factor)[2]['loss'])(
            student, state, jax.random.key(2))

  batch = method.sample(state, jax.random.split(jax.random.split(jax.random.key(2), 1)[0])[0])
  of_student = student.network.forward(batch.images, train=True)[0]
  transfer = divergence.attention_transfer(of_student.maps, teacher(batch.images).maps).mean()
  assert float(transfer) > 1e-3
  np.testing.assert_allclose(loss(2.5) - loss(0.0), 2.5 * transfer, rtol=1e-3)
