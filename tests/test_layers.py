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


@st.composite
def convolutions(draw):
  """Shapes and options of a convolution that has at least one pixel of output."""
  size = lambda low, high: st.integers(low, high)
  pair = lambda low, high: (draw(size(low, high)), draw(size(low, high)))
  image, kernel = pair(4, 9), pair(1, 4)
  lhs, rhs = (draw(size(1, 3)), *image, draw(size(1, 3))), (*kernel,)
  options = {
      'window_strides': pair(1, 3), 'lhs_dilation': pair(1, 2), 'rhs_dilation': pair(1, 2),
      'padding': draw(st.one_of(
          st.sampled_from(['SAME', 'VALID']), st.tuples(*[st.tuples(size(-1, 3), size(-1, 3))] * 2)))}
  if isinstance(options['padding'], str):
    options['lhs_dilation'] = (1, 1)
  rhs = (*rhs, lhs[-1], draw(size(1, 4)))
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


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(convolutions())
def test_convolution_has_the_derivatives_of_the_stock_one(case):
  lhs, rhs, options = case
  with jax.enable_x64(True):
    lhs, rhs = inputs(lhs, rhs)
    both = jax.jit(lambda l, r: [
        derivatives(conv, options, l, r, 0.5) for conv in (layers.conv_general_dilated, lax.conv_general_dilated)])
    assert_trees_close(*both(lhs, rhs))


@hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
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
  """What the custom gradient is for: no convolution of another layout in the program."""
  if jax.default_backend() != 'cpu':
    pytest.skip('Other backends get the stock convolution.')
  module = layers.Conv(5, (3, 3), 2, padding=1)
  x = jnp.ones((2, 9, 8, 3))
  params = module.init(jax.random.key(0), x)

  def step(params, _):
    return jax.tree.map(jnp.subtract, params, jax.grad(lambda p: module.apply(p, x).sum())(params)), None

  program = jax.jit(lambda p: lax.scan(step, p, length=3)[0]).lower(params).as_text()
  dims = [line.split('dim_numbers = ')[1].split(',  ')[0].split(', window')[0]
          for line in program.splitlines() if 'stablehlo.convolution' in line]
  assert dims
  assert set(dims) == {'[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]'}


@pytest.mark.parametrize('options', [
    {'feature_group_count': 2}, {'batch_group_count': 2}, {'precision': lax.Precision.HIGHEST},
    {'preferred_element_type': jnp.float32}, {'lhs_dilation': None, 'rhs_dilation': None}])
def test_other_options_are_those_of_the_stock_convolution(options):
  groups = options.get('feature_group_count', 1)
  lhs, rhs = jnp.ones((2, 5, 6, 4)), jnp.arange(72.0 * 4 / groups).reshape(3, 3, 4 // groups, 8)
  options = {'dimension_numbers': _NHWC, **options}
  ours = layers.conv_general_dilated(lhs, rhs, (1, 2), [(1, 1), (1, 1)], **options)
  np.testing.assert_allclose(ours, lax.conv_general_dilated(lhs, rhs, (1, 2), [(1, 1), (1, 1)], **options))


def test_convolution_of_another_layout_takes_the_stock_form():
  lhs, rhs = jnp.ones((2, 3, 5, 6)), jnp.arange(54.0 * 2).reshape(4, 3, 3, 3)
  np.testing.assert_allclose(
      layers.conv_general_dilated(lhs, rhs, (1, 1), 'SAME', dimension_numbers=None),
      lax.conv_general_dilated(lhs, rhs, (1, 1), 'SAME'))


class Foreign(nn.Module):
  """A user's own model, with stock layers and another name for the flag."""

  @nn.compact
  def __call__(self, x, training: bool = False):
    x = nn.relu(nn.BatchNorm(use_running_average=not training, name='first')(nn.Conv(5, (3, 3), name='conv')(x)))
    x = nn.Dense(4, name='dense')(x)
    x = nn.BatchNorm(name='second')(x, use_running_average=not training)
    return nn.Dense(3)(x.mean((1, 2)))


def test_moments_are_those_of_the_inputs_of_a_users_own_batch_norms():
  module = Foreign()
  network = models.create_network(module, jax.random.key(0), (6, 7, 2), mean=(0.3, 0.5), std=(2.0, 4.0))
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
    np.testing.assert_allclose(outputs.moments[norm].mean, ours.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs.moments[norm].var, ours.var((0, 1, 2)), rtol=1e-5)


def test_variance_survives_a_large_mean():
  inputs_ = 1000 + np.random.default_rng(0).normal(size=(7, 5, 6, 2)).astype(np.float32) * 0.1
  moments = layers.moments_of(jnp.asarray(inputs_))
  np.testing.assert_allclose(moments.var, inputs_.astype(np.float64).var((0, 1, 2)), rtol=1e-2)


def test_paths_are_the_same_eagerly_compiled_and_in_training():
  network = models.create_network(models.create('resnet8', 4), jax.random.key(0), (8, 8, 3))
  images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
  eager, compiled = network(images).moments, jax.jit(lambda n, x: n(x).moments)(network, images)
  trained = network.forward(images, train=True)[0].moments
  assert list(eager) == list(compiled) == list(trained) == list(network.running())
  assert 'layer2_0/downsample_1' in eager
  for path in eager:
    np.testing.assert_allclose(eager[path].var, compiled[path].var, rtol=1e-4)


def test_training_moves_running_moments_and_evaluation_does_not():
  network = models.create_network(models.create('convnet', 4), jax.random.key(0), (12, 8, 1))
  images = jax.random.uniform(jax.random.key(1), (5, 12, 8, 1))
  outputs, stats = network.forward(images, train=True)
  for path, moments in outputs.moments.items():
    np.testing.assert_allclose(stats[path]['mean'], 0.1 * moments.mean, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(stats[path]['var'], 0.9 + 0.1 * moments.var, rtol=1e-4)
  assert network.forward(images)[1] is network.batch_stats


@pytest.mark.parametrize('train', [False, True])
def test_moments_span_the_devices_of_an_axis(train):
  network = models.create_network(models.create('convnet', 4), jax.random.key(0), (8, 12, 1))
  images = jax.random.uniform(jax.random.key(1), (6, 8, 12, 1))
  whole = network.forward(images, train=train)
  split = jax.vmap(
      lambda part: network.forward(part, train=train, axis='data'), axis_name='data',
      out_axes=(0, None) if not train else 0)(images.reshape(3, 2, 8, 12, 1))
  np.testing.assert_allclose(split[0].logits.reshape(6, 4), whole[0].logits, rtol=1e-4, atol=1e-5)
  for path, moments in whole[0].moments.items():
    np.testing.assert_allclose(split[0].moments[path].var[1], moments.var, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(split[0].moments[path].mean[2], moments.mean, rtol=1e-4, atol=1e-6)
  if train:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-6), split[1], whole[1])


def test_capture_keeps_vectors_alive_and_no_activations():
  """With moments, a compiled network needs some KiB more; with its maps, MiB."""
  network = models.create_network(models.create('wrn16_1', 10), jax.random.key(0), (32, 32, 3))
  images = jnp.zeros((64, 32, 32, 3))

  def needed(what):
    analysis = jax.jit(lambda n, x: what(n(x))).lower(network, images).compile().memory_analysis()
    return (analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / 1024

  logits = needed(lambda o: o.logits)
  moments = needed(lambda o: (o.logits, o.moments))
  maps = needed(lambda o: (o.logits, o.maps))
  print(f'{logits:.0f} KiB, with moments {moments - logits:+.1f}, with maps {maps - logits:+.1f}')
  assert moments - logits < 64
  assert maps - logits > 1024


@pytest.mark.parametrize(('flag', 'sense'), [
    ('train', True), ('training', True), ('is_training', True), ('use_running_average', False),
    ('deterministic', False), (None, True)])
def test_network_sets_the_flag_that_a_module_has(flag, sense):
  def call(self, x, **kwargs):
    mode = kwargs.get(flag, not sense)
    return nn.Dense(2)(nn.BatchNorm(use_running_average=mode != sense)(x).mean((1, 2)))

  scope = {'call': nn.compact(call)}
  exec(f'def __call__(self, x{f", {flag}=None" if flag else ""}):\n'
       f'  return call(self, x{f", {flag}={flag}" if flag else ""})', scope)
  module = type('Flagged', (nn.Module,), {'__call__': nn.compact(scope['__call__'])})()
  network = models.create_network(module, jax.random.key(0), (4, 5, 3))
  images = 1 + jax.random.uniform(jax.random.key(1), (2, 4, 5, 3))
  if flag is None:
    return
  moved = network.forward(images, train=True)[1]['BatchNorm_0']['mean']
  np.testing.assert_allclose(moved, 0.01 * images.mean((0, 1, 2)), rtol=1e-4)
  kept = network.forward(images)[0].logits
  np.testing.assert_allclose(
      kept, nn.Dense(2).apply({'params': network.params['Dense_0']}, images.mean((1, 2)) / np.sqrt(1 + 1e-5)),
      rtol=1e-4, atol=1e-5)
