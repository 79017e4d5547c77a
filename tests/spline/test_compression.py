"""Dense layers of a classifier that become one hidden layer."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from dfkd_jax import models, spline

GROUPS, SHAPE, CLASSES, KEY = ((2,), (3,)), (28, 28, 1), 3, jax.random.key(5)
SMALL = dict(hidden=None, head_width=21)


@pytest.fixture(scope='module')
def teacher():
  """With two hidden layers that bend its logits, and moments of trained batch norms."""
  module = models.ImageNetVGG(CLASSES, GROUPS, hidden=7)
  network = models.create_network(module, KEY, SHAPE, mean=(0.4,), std=(0.2,))
  draw = np.random.default_rng(0)
  params = {name: layer if 'features' in name else {
      'kernel': draw.normal(size=layer['kernel'].shape).astype(np.float32) / 2,
      'bias': draw.normal(size=layer['bias'].shape).astype(np.float32)}
            for name, layer in network.params.items()}
  stats = jax.tree.map(lambda leaf: leaf + 0.1, network.batch_stats)
  return network.replace(params=params, batch_stats=stats)


@pytest.fixture(scope='module')
def images():
  """Sums of four smooth patterns: few directions, as of real images."""
  draw = np.random.default_rng(1)
  patterns = draw.uniform(size=(4, 4, 4)).repeat(7, 1).repeat(7, 2)
  mixed = np.einsum('np,phw->nhw', draw.dirichlet(np.ones(4), 500), patterns)
  return np.uint8(255 * mixed)[..., None]


def centred(logits):
  return logits - logits.mean(1, keepdims=True)


def test_one_hidden_layer_takes_the_place_of_the_stack(teacher, images):
  train, test = images[:400], images[400:] / np.float32(255)
  wanted = centred(teacher(test).logits)
  errors = {}
  for kind in ('ridge', 'spline', 'random_features'):
    module = teacher.module.clone(**SMALL)
    network = spline.compress(teacher, module, train, kind, KEY, batch_size=90)
    assert set(network.params) == {
        'features_0', 'features_1', 'features_4', 'features_5', 'classifier_6_hidden',
        'classifier_6'}
    assert network.params['classifier_6_hidden']['kernel'].shape == (49 * 3, 21)
    assert network.mean == teacher.mean
    outputs = network(test)
    np.testing.assert_array_equal(outputs.maps[1], teacher(test).maps[1])
    # The head is the fit of these features, which are the inputs of the stack.
    layers = {f'Dense_{i}': network.params[name]
              for i, name in enumerate(('classifier_6_hidden', 'classifier_6'))}
    head = spline.ReluNetwork((21,), CLASSES).apply({'params': layers}, outputs.features)
    np.testing.assert_allclose(outputs.logits, head, rtol=1e-5, atol=1e-5)
    errors[kind] = np.square(centred(outputs.logits) - wanted).mean() / wanted.var()
  assert errors['spline'] < errors['ridge'] < 0.3
  assert errors['random_features'] < 0.3


def test_features_are_the_inputs_of_the_stack(teacher, images):
  """The first dense layer of the teacher, applied to them, gives its own hidden units."""
  batch = images[:5] / np.float32(255)
  network = spline.compress(teacher, teacher.module.clone(**SMALL), images, 'ridge', KEY)
  x = network(batch).features
  for name in ('classifier_0', 'classifier_3'):
    x = np.maximum(x @ teacher.params[name]['kernel'] + teacher.params[name]['bias'], 0)
  np.testing.assert_allclose(x, teacher(batch).features, rtol=1e-4, atol=1e-4)


def test_one_dense_layer_takes_the_place_of_the_stack(teacher, images):
  """The least-squares map of the convolutions' features, with its small ridge penalty."""
  train, test = images[:400], images[400:] / np.float32(255)
  network = spline.compress(teacher, teacher.module.clone(hidden=None), train, 'ridge', KEY)
  assert set(network.params) == {
      'features_0', 'features_1', 'features_4', 'features_5', 'classifier_6'}
  assert network.params['classifier_6']['kernel'].shape == (49 * 3, CLASSES)
  wanted = centred(teacher(test).logits)
  assert np.square(centred(network(test).logits) - wanted).mean() < 0.3 * wanted.var()


class Headless(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(CLASSES)(x.mean((1, 2)))


@pytest.mark.parametrize(('module', 'rows', 'message'), [
    (models.ImageNetVGG(CLASSES, GROUPS, hidden=None, head_width=5), 400, 'width is 5, .* 6'),
    (models.ImageNetVGG(CLASSES, GROUPS, **SMALL), 163, '163 rows, .* more than the 163 terms'),
    (models.ImageNetVGG(CLASSES, ((2,), (4,)), **SMALL), 400, "no layer 'features_4'"),
    (models.ImageNetVGG(CLASSES, ((2,), (3,), (3,)), **SMALL), 400, "no layer 'features_8'"),
    (Headless(), 400, 'Headless names no dense layer'),
])
def test_wrong_modules_are_named(teacher, images, module, rows, message):
  with pytest.raises(ValueError, match=rf'\A(?!.*\n).*{message}'):
    spline.compress(teacher, module, images[:rows], 'spline', KEY)
