"""Convolutions with loop-safe gradients, and the capture of batch norms' inputs."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import strategies as st
from jax import lax

from dfkd_jax import models
from dfkd_jax.models import layers

_NHWC = ('NHWC', 'HWIO', 'NHWC')


def fresh(module, image_shape, **preprocessing):
  """As `models.create_network`, but NumPy draws, which saves compiling `init`."""
  rng = np.random.default_rng(0)
  draw = lambda path, s: jnp.asarray(
      rng.normal(size=s.shape) / np.sqrt(np.prod(s.shape[:-1])) if len(s.shape) > 1
      else np.full(s.shape, float(path[-1].key in ('scale', 'var'))), s.dtype)
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
  return models.bind(module, jax.tree_util.tree_map_with_path(draw, shapes), **preprocessing)


@st.composite
def convolutions(draw):
  """Shapes and options of a convolution that has at least one pixel of output."""
  size = lambda low, high: st.integers(low, high)
  pair = lambda low, high: (draw(size(low, high)), draw(size(low, high)))
  image, kernel = pair(4, 9), pair(1, 4)
  lhs, rhs = (draw(size(1, 3)), *image, draw(st.sampled_from([1, 3, 6]))), (*kernel,)
  depthwise = draw(st.booleans())
  # Without dilation gradients are products.
  dilated = 2 if draw(st.sampled_from([False, False, True])) else 1
  options = {
      'window_strides': pair(1, 3), 'lhs_dilation': pair(1, dilated),
      'rhs_dilation': pair(1, dilated),
      'padding': draw(st.one_of(
          st.sampled_from(['SAME', 'VALID']),
          st.tuples(*[st.tuples(size(-1, 3), size(-1, 3))] * 2)))}
  if isinstance(options['padding'], str):
    options['lhs_dilation'] = (1, 1)
  rhs = (*rhs, 1, lhs[-1]) if depthwise else (*rhs, lhs[-1], draw(st.sampled_from([2, 5, 7])))
  options['feature_group_count'] = lhs[-1] if depthwise else 1
  out = jax.eval_shape(
      functools.partial(lax.conv_general_dilated, dimension_numbers=_NHWC, **options),
      jnp.zeros(lhs), jnp.zeros(rhs))
  hypothesis.assume(min(out.shape) > 0)
  return lhs, rhs, options


def derivatives(conv, options, lhs, rhs, seed):
  """The convolution, its gradients, and gradients of a mixture of these gradients."""
  conv = functools.partial(conv, dimension_numbers=_NHWC, **options)
  cosine = lambda x, phase: jnp.cos(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) + phase)

  def scalar(lhs, rhs):
    out = conv(lhs, rhs)
    return (out * jnp.sin(out) * cosine(out, seed)).sum(), out

  def of_gradients(lhs, rhs):
    grads, out = jax.grad(scalar, argnums=(0, 1), has_aux=True)(lhs, rhs)
    return sum((g * cosine(g, 1.0)).sum() for g in grads), (out, grads)

  return jax.grad(of_gradients, argnums=(0, 1), has_aux=True)(lhs, rhs)


def inputs(lhs, rhs, *batch):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(*batch, *lhs))), jnp.asarray(rng.normal(size=(*batch, *rhs)))


def assert_trees_close(ours, theirs, tolerance=1e-10):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max()))


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(convolutions())
def test_convolution_has_the_derivatives_of_the_stock_one(case):
  lhs, rhs, options = case
  with jax.enable_x64(True):
    lhs, rhs = inputs(lhs, rhs)
    both = jax.jit(lambda l, r: [
        derivatives(conv, options, l, r, 0.5)
        for conv in (layers.conv_general_dilated, lax.conv_general_dilated)])
    assert_trees_close(*both(lhs, rhs))


@hypothesis.settings(max_examples=2, deadline=None, derandomize=True)
@hypothesis.given(convolutions())
def test_convolution_in_vmap_and_scan(case):
  lhs, rhs, options = case
  with jax.enable_x64(True):
    lhs, rhs = inputs(lhs, rhs, 3)
    canonical = functools.partial(derivatives, layers.conv_general_dilated, options, seed=0.5)
    stock = functools.partial(derivatives, lax.conv_general_dilated, options, seed=0.5)
    loop = jax.jit(lambda l, r: lax.scan(lambda c, lr: (c, canonical(*lr)), 0, (l, r))[1])
    expected = jax.jit(jax.vmap(stock))(lhs, rhs)
    assert_trees_close(loop(lhs, rhs), expected)
    assert_trees_close(jax.jit(jax.vmap(canonical))(lhs, rhs), expected)
    shared = jax.jit(jax.vmap(canonical, (0, None)))(lhs, rhs[0])
    assert_trees_close(shared, jax.jit(jax.vmap(stock, (0, None)))(lhs, rhs[0]))


def test_convolution_gradients_are_canonical_within_loops():
  """The custom gradient leaves no convolution of another layout in the program."""
  if jax.default_backend() != 'cpu':
    pytest.skip('Other backends get the stock convolution.')
  module = layers.Conv(5, (3, 3), 2, padding=1)
  x = jnp.ones((2, 9, 8, 6))
  params = fresh(module, x.shape[1:]).params

  gradient = jax.grad(lambda params: jnp.square(module.apply({'params': params}, x)).sum())
  loop = jax.jit(lambda p: lax.scan(lambda p, _: (gradient(p), None), p, length=3)[0])
  program = loop.lower(params).as_text()
  dims = [line.split('dim_numbers = ')[1].split(', window')[0]
          for line in program.splitlines() if 'stablehlo.convolution' in line]
  assert dims
  assert set(dims) == {'[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]'}


@pytest.mark.parametrize(('size', 'strides', 'padding'), [
    (3, 1, 'SAME'), (3, 2, 'SAME'), (5, 2, 'SAME'), (5, 1, ((2, 2), (2, 2))),
    (3, (2, 3), ((1, 0), (-1, 2)))])
def test_depthwise_convolution_has_the_derivatives_of_the_stock_one_in_a_scan(
    size, strides, padding):
  strides = strides if isinstance(strides, tuple) else (strides, strides)
  options = {'window_strides': strides, 'padding': padding, 'feature_group_count': 6}
  with jax.enable_x64(True):
    lhs, rhs = inputs((2, 9, 8, 6), (size, size, 1, 6), 2)
    ours, stock = (
        functools.partial(derivatives, conv, options, seed=0.5)
        for conv in (layers.conv_general_dilated, lax.conv_general_dilated))
    mapped = jax.jit(lambda *both: lax.map(lambda one: (ours(*one), stock(*one)), both))
    assert_trees_close(*mapped(lhs, rhs))


def test_depthwise_convolution_leaves_no_convolution_in_the_program():
  if jax.default_backend() != 'cpu':
    pytest.skip('Other backends get the stock convolution.')
  gradient = jax.grad(lambda *both: jnp.square(layers.conv_general_dilated(
      *both, (2, 2), 'SAME', dimension_numbers=_NHWC, feature_group_count=5)).sum(), argnums=(0, 1))
  program = jax.jit(gradient).lower(jnp.ones((2, 6, 7, 5)), jnp.ones((3, 3, 1, 5))).as_text()
  assert 'stablehlo.convolution' not in program


@pytest.mark.parametrize('shape', [(2, 3, 4, 5, 6), (1, 1, 5, 2, 1)])
def test_upsampled_convolution_is_one_of_repeated_pixels(shape):
  *shape, outputs = shape
  with jax.enable_x64(True):
    maps, kernel = inputs(shape, (3, 3, shape[-1], outputs))

    def repeated(maps, kernel):
      maps = maps.repeat(2, axis=1).repeat(2, axis=2)
      return lax.conv_general_dilated(maps, kernel, (1, 1), 'SAME', dimension_numbers=_NHWC)

    def with_gradients(conv):
      return jax.value_and_grad(lambda m, k: jnp.sin(conv(m, k)).sum(), argnums=(0, 1))

    ours, theirs = jax.jit(lambda m, k: [
        with_gradients(conv)(m, k) for conv in (layers.upsampled_conv, repeated)])(maps, kernel)
    assert_trees_close(ours, theirs)


@pytest.mark.parametrize('options', [
    {'feature_group_count': 2}, {'feature_group_count': 4}, {'batch_group_count': 2},
    {'precision': lax.Precision.HIGHEST}, {'preferred_element_type': jnp.float32},
    {'lhs_dilation': None, 'rhs_dilation': None}])
def test_other_options_are_those_of_the_stock_convolution(options):
  groups = options.get('feature_group_count', 1)
  lhs, rhs = jnp.ones((2, 5, 6, 4)), jnp.arange(72.0 * 4 / groups).reshape(3, 3, 4 // groups, 8)
  options = {'dimension_numbers': _NHWC, **options}
  ours = layers.conv_general_dilated(lhs, rhs, (1, 2), [(1, 1), (1, 1)], **options)
  np.testing.assert_allclose(
      ours, lax.conv_general_dilated(lhs, rhs, (1, 2), [(1, 1), (1, 1)], **options))


def test_convolution_of_another_layout_takes_the_stock_form():
  lhs, rhs = jnp.ones((2, 3, 5, 6)), jnp.arange(54.0 * 2).reshape(4, 3, 3, 3)
  np.testing.assert_allclose(
      layers.conv_general_dilated(lhs, rhs, (1, 1), 'SAME', dimension_numbers=None),
      lax.conv_general_dilated(lhs, rhs, (1, 1), 'SAME'))


class Foreign(nn.Module):
  """A user's own model, with stock layers and another name for the flag."""

  @nn.compact
  def __call__(self, x, training: bool = False):
    x = nn.Conv(5, (3, 3), name='conv')(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not training, name='first')(x))
    x = nn.Dense(4, name='dense')(x)
    x = nn.BatchNorm(name='second')(x, use_running_average=not training)
    return nn.Dense(3)(x.mean((1, 2)))


def test_moments_are_those_of_the_inputs_of_a_users_own_batch_norms():
  module = Foreign()
  network = fresh(module, (6, 7, 2), mean=(0.3, 0.5), std=(2.0, 4.0))
  images = jax.random.uniform(jax.random.key(1), (3, 6, 7, 2))
  normalised = (images - np.array([0.3, 0.5])) / np.array([2.0, 4.0])
  _, state = module.apply(
      {'params': network.params, 'batch_stats': network.batch_stats}, normalised,
      capture_intermediates=True, mutable=['intermediates'])
  outputs = network(images)
  assert list(outputs.moments) == list(network.running()) == ['first', 'second']
  assert outputs.features is None
  for norm, source in (('first', 'conv'), ('second', 'dense')):
    ours = np.asarray(state['intermediates'][source]['__call__'][0], np.float64)
    np.testing.assert_allclose(
        outputs.moments[norm].mean, ours.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs.moments[norm].var, ours.var((0, 1, 2)), rtol=1e-5)


def test_variance_survives_a_large_mean():
  inputs_ = 1000 + np.random.default_rng(0).normal(size=(7, 5, 6, 2)).astype(np.float32) * 0.1
  for shift in (None, jnp.array([1000.5, 998.0])):  # Five and twenty times the spread away.
    moments = layers.moments_of(jnp.asarray(inputs_), shift=shift)
    np.testing.assert_allclose(moments.mean, inputs_.astype(np.float64).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(moments.var, inputs_.astype(np.float64).var((0, 1, 2)), rtol=1e-2)


def test_paths_are_the_same_eagerly_compiled_and_in_training():
  network = fresh(models.create('resnet8', 4), (8, 8, 3))
  images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
  eager, compiled = network(images).moments, jax.jit(lambda n, x: n(x).moments)(network, images)
  trained = jax.jit(lambda n, x: n.forward(x, train=True)[0].moments)(network, images)
  assert list(eager) == list(compiled) == list(trained) == list(network.running())
  assert 'layer2_0/downsample_1' in eager
  for path in eager:
    np.testing.assert_allclose(eager[path].var, compiled[path].var, rtol=1e-4)


def test_training_moves_running_moments_and_evaluation_does_not():
  network = fresh(models.create('convnet', 4), (12, 8, 1))
  images = jax.random.uniform(jax.random.key(1), (5, 12, 8, 1))
  outputs, stats = jax.jit(lambda n, x: n.forward(x, train=True))(network, images)
  for path, moments in outputs.moments.items():
    np.testing.assert_allclose(stats[path]['mean'], 0.1 * moments.mean, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(stats[path]['var'], 0.9 + 0.1 * moments.var, rtol=1e-4)
  assert network.forward(images)[1] is network.batch_stats


@pytest.mark.parametrize('train', [False, True])
def test_moments_span_the_devices_of_an_axis(train):
  network = fresh(models.create('convnet', 4, widths=(3, 5), strides=(2, 1)), (8, 12, 1))
  images = jax.random.uniform(jax.random.key(1), (6, 8, 12, 1))
  whole = jax.jit(lambda x: network.forward(x, train=train))(images)
  split = jax.jit(jax.vmap(
      lambda part: network.forward(part, train=train, axis='data'), axis_name='data',
      out_axes=(0, None) if not train else 0))(images.reshape(3, 2, 8, 12, 1))
  np.testing.assert_allclose(split[0].logits.reshape(6, 4), whole[0].logits, rtol=1e-4, atol=1e-5)
  for path, moments in whole[0].moments.items():
    np.testing.assert_allclose(split[0].moments[path].var[1], moments.var, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(split[0].moments[path].mean[2], moments.mean, rtol=1e-4, atol=1e-6)
  if train:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-6), split[1], whole[1])


def test_capture_keeps_vectors_alive_and_no_activations():
  """37 batch norms need the memory of 13: the returned vectors and at most one map at a time."""

  def needed(name):
    module = models.create(name, 10)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    run = jax.jit(
        lambda network, images: network(images)._replace(maps=(), features=None, pooled={}))
    images = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)
    return run.lower(models.bind(module, variables), images).compile().memory_analysis()

  shallow, deep = needed('wrn16_1'), needed('wrn40_1')
  vectors = lambda channels: 4 * (2 * channels + 64 * 10)
  assert 0 <= shallow.output_size_in_bytes - vectors(464) < 1024
  assert 0 <= deep.output_size_in_bytes - vectors(1360) < 1024
  one_map = 4 * 64 * 32 * 32 * 16
  # All 13 inputs would be 8, all 37 of the other 21.
  assert shallow.temp_size_in_bytes < 5 * one_map
  assert abs(deep.temp_size_in_bytes - shallow.temp_size_in_bytes) < one_map / 64


class Opposite(nn.Module):
  """A user's own model with a flag of the opposite sense."""

  @nn.compact
  def __call__(self, x, deterministic: bool = False):
    x = nn.BatchNorm(use_running_average=deterministic, name='norm')(x)
    return nn.Dense(2, name='dense')(x.mean((1, 2)))


class Flagless(nn.Module):
  """A user's own model that only evaluates, and has no batch norm."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, name='dense')(x.mean((1, 2)))


@pytest.mark.parametrize('module', [Opposite(), Flagless()])
def test_network_sets_the_flag_that_a_module_has(module):
  network = fresh(module, (4, 5, 3))
  images = 1 + jax.random.uniform(jax.random.key(1), (2, 4, 5, 3))
  outputs, stats = network.forward(images, train=True)
  if 'norm' in outputs.moments:
    np.testing.assert_allclose(stats['norm']['mean'], 0.01 * images.mean((0, 1, 2)), rtol=1e-4)
  expected = nn.Dense(2).apply({'params': network.params['dense']}, images.mean((1, 2)))
  np.testing.assert_allclose(network(images).logits, expected, rtol=1e-4)
