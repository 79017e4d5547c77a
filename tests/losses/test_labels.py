"""Losses of supervised training by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.losses import divergence, labels

LOGITS = jnp.log(jnp.array(
    [[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], [[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]]]))
LABELS = jnp.array([[0, 1], [255, 1]])


def test_without_gamma_it_is_the_cross_entropy_of_labelled_pixels():
  np.testing.assert_allclose(labels.focal(LOGITS, LABELS),
                             divergence.cross_entropy(LOGITS, LABELS, ignore=255), rtol=1e-5)


def test_focal_loss_by_hand():
  found = labels.focal(LOGITS, LABELS, gamma=2.0)
  wanted = [[0.3**2 * -np.log(0.7), 0.9**2 * -np.log(0.1)], [0, 0.4**2 * -np.log(0.6)]]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize('gamma', [0.5, 2.0])
def test_its_gradient_is_finite_where_the_network_is_certain(gamma):
  loss = lambda logits: labels.focal(logits, jnp.array([1, 0]), gamma=gamma).sum()
  grad = jax.grad(loss)(jnp.array([[-200.0, 200.0], [-200.0, 200.0]]))
  assert np.isfinite(grad).all()
  assert grad[1, 0] < 0  # The wrong one is still corrected.


def test_median_frequency_by_hand():
  # Class 0: 6 of 8 labelled pixels of both images; class 1: 1 of 4; class 3: 1 of 4.
  masks = np.array([[[0, 0], [0, 1]], [[0, 0], [3, 0]]], np.uint8)
  found = labels.median_frequency(masks, 5, ignore=255)
  frequencies = np.array([6 / 8, 1 / 4, 1 / 4])
  wanted = np.median(frequencies) / frequencies
  np.testing.assert_allclose(found, [wanted[0], wanted[1], 0, wanted[2], 0], rtol=1e-6)


def test_median_frequency_of_one_label_an_image():
  found = labels.median_frequency(np.array([0] * 6 + [2] * 3 + [1] * 2), 4, ignore=-1)
  np.testing.assert_allclose(found, [3 / 6, 3 / 2, 1, 0], rtol=1e-6)


def test_ignored_pixels_count_for_no_class():
  masks = np.array([[[0, 1, 4]], [[1, 4, 4]]], np.uint8)
  found = labels.median_frequency(masks, 5, ignore=4)
  # Class 0: 1 of 2 pixels; class 1: 2 of 3.
  np.testing.assert_allclose(found[:2], np.median([1 / 2, 2 / 3]) / np.array([1 / 2, 2 / 3]))
  assert found[4] == 0
