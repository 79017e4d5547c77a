"""The generator that translates drawings of shapes."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax import models
from dfkd_jax.models.shapes_generator import draw

# Numbers of a shape: size, aspect, angle, x, y, kind, brightness, colour (3), slope (2), textures
# (2), wave (2). All 0: an ellipse that stands upright in the middle, without colour.
SIZE, X, Y, KIND, BRIGHTNESS, COLOR = 0, 3, 4, 5, 6, 7


def _latents(*shapes):
  """One image of shapes given as {number: value}."""
  latents = np.zeros((1, len(shapes), 16), np.float32)
  for k, numbers in enumerate(shapes):
    for number, value in numbers.items():
      latents[0, k, number] = value
  return jnp.asarray(latents)


def test_a_shape_covers_those_before_it():
  latents = _latents({SIZE: 4, KIND: 1, BRIGHTNESS: -1}, {SIZE: -2, BRIGHTNESS: 2, COLOR + 1: 1})
  drawing = np.asarray(draw(latents, (24, 30, 3)))[0]
  np.testing.assert_allclose(drawing[12, 15], [1.8, 1.8 + 0.35, 1.8], rtol=1e-6)
  for corner in ((0, 0), (0, 29), (23, 0), (23, 29)):
    np.testing.assert_allclose(drawing[corner], -0.9, rtol=1e-6)


@pytest.mark.parametrize('kind', [-1, 1])
def test_ellipses_and_rectangles_cover_their_area(kind):
  height, width = 200, 170
  drawing = draw(_latents({SIZE: -2, KIND: kind, BRIGHTNESS: 1 / 0.9}), (height, width, 1))
  radius = 0.35 * height
  area = 4 * radius**2 if kind > 0 else np.pi * radius**2
  assert float(drawing.sum()) == pytest.approx(area, rel=0.02)


def test_the_centre_follows_the_latents():
  x, y, share = 0.4, -0.3, statistics.NormalDist().cdf
  drawing = draw(_latents({SIZE: -5, X: x, Y: y, BRIGHTNESS: 1}), (90, 140, 1))[0, ..., 0]
  rows, columns = np.nonzero(np.asarray(drawing) > 0.4)
  assert columns.mean() == pytest.approx((1.2 * share(x) - 0.1) * 140, abs=1)
  assert rows.mean() == pytest.approx((1.2 * share(y) - 0.1) * 90, abs=1)


def test_drawings_are_standardized_and_differ():
  drawings = np.asarray(draw(jax.random.normal(jax.random.key(0), (40, 24, 16)), (24, 32, 3)))
  assert abs(drawings.mean()) < 0.1
  assert 0.8 < drawings.std() < 1.3
  assert np.isfinite(drawings).all()
  first, *others = drawings
  assert min(np.abs(first - other).mean() for other in others) > 0.3


@pytest.mark.parametrize('shape', [(11, 13, 1), (8, 12, 3)])
def test_images_have_the_shape_asked_for(shape):
  module = models.ShapesGenerator(shape, width=6)
  assert module.latent_shape(shape, 5) == (5, 16)
  latents = jax.random.normal(jax.random.key(1), (3, 5, 16))
  variables = jax.jit(module.init)(jax.random.key(2), latents)
  train = jax.jit(functools.partial(module.apply, mutable=['batch_stats']))
  images, new = train(variables, latents)
  assert images.shape == (3, *shape)
  assert 0 < images.min() < images.max() < 1
  sampled = jax.jit(functools.partial(module.apply, train=False))(variables | new, latents)
  assert np.abs(sampled - images).max() > 1e-3  # by running moments, which one batch has not filled

  def loss(variables, latents):
    return train(variables, latents)[0].var()

  of_variables, of_latents = jax.grad(loss, (0, 1))(variables, latents)
  assert not np.any(of_latents)
  for path, gradient in jax.tree.leaves_with_path(of_variables['params']):
    assert np.any(gradient), path


def test_more_than_three_channels_are_refused():
  with pytest.raises(ValueError, match='1 to 3 channels, not 4'):
    models.ShapesGenerator().latent_shape((8, 8, 4), 5)
