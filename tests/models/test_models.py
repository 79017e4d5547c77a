"""The models against the numbers of the published code, and their own promises."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from conftest import HERE, SHARED, golden
from flax import traverse_util
from golden_networks import count, drawn_variables, nhwc, recipe, shapes_of

from dfkd_jax import models, weights
from dfkd_jax.models import resnet

CIFAR = {'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2023, 0.1994, 0.2010)}
ZOO = (
    'wrn16_1', 'wrn16_2', 'wrn40_1', 'wrn40_2', 'resnet8', 'resnet20', 'resnet32', 'resnet56',
    'resnet110',
    'resnet8x4', 'resnet32x4', 'vgg8', 'vgg11', 'vgg13', 'resnet18', 'resnet34', 'resnet50')
IMAGENET = ('resnet18_imagenet', 'resnet50_imagenet', 'mobilenetv2_imagenet')
# Deeper than another network of the same blocks.
LARGE = ('resnet110', 'resnet56', 'resnet32', 'resnet50', 'resnet34', 'resnet32x4', 'vgg13',
         'wrn40_1', 'wrn40_2')
SMALL = ('wrn16_1', 'wrn16_2', 'resnet8', 'resnet20', 'resnet8x4', 'vgg8')


@functools.cache
def zoo():
  for folder in (SHARED / 'golden', HERE / 'golden'):
    if (folder / 'zoo.json').exists():
      return json.loads((folder / 'zoo.json').read_text())
  pytest.skip('Reference values zoo.json are not at hand.')


def input_of(values, name):
  """Images [B, H, W, C] of zoo_forward."""
  if name in IMAGENET:
    return nhwc(values['x224_low'].repeat(32, axis=2).repeat(32, axis=3))
  return nhwc(values['x32'])


def as_float64(tree):
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def fresh(module, image_shape):
  return models.bind(module, drawn_variables(module, image_shape), mean=(0.5,), std=(0.5,))


def weights_of(arrays, prefix):
  return {
      name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


@pytest.mark.parametrize('name', ZOO + IMAGENET)
def test_counts_and_names_are_those_of_the_published_models(name):
  entry = zoo()[name]
  classes = entry['num_classes_forward']
  shapes = shapes_of(models.create(name, classes))
  assert count(shapes['params']) == entry['params'][str(classes)]
  if classes == 10:
    more_classes = 90 * (entry['return_features'][0] + 1)
    assert count(shapes['params']) + more_classes == entry['params']['100']
  assert count(shapes['batch_stats']) == entry['buffers']
  state_dict = weights.from_variables(
      jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes))
  assert {k: list(v.shape) for k, v in state_dict.items()} == dict(entry['state_dict'])
  norms = {k.removesuffix('.running_var') for k in state_dict if k.endswith('.running_var')}
  assert norms == set(entry['bn_hook_order'])


@pytest.mark.parametrize('name', ['wrn40_2', 'resnet8x4', 'vgg11', 'resnet18'])
def test_a_hundred_classes(name):
  assert count(shapes_of(models.create(name, 100))['params']) == zoo()[name]['params']['100']


@pytest.mark.parametrize(('name', 'precision'), [
    *(pytest.param(name, 'f32', marks=pytest.mark.exhaustive) if name in LARGE else (name, 'f32')
      for name in ZOO + IMAGENET if name not in SMALL),
    *((name, 'f64') for name in SMALL)])
def test_forward_pass_and_moments_are_those_of_the_published_models(name, precision):
  values, entry = golden('zoo_forward'), zoo()[name]
  module, images = models.create(name, entry['num_classes_forward']), input_of(values, name)
  variables = weights.to_variables(
      recipe(entry['state_dict'], entry['gain']), module, images.shape[1:])
  with jax.enable_x64(precision == 'f64'):
    dtype = jnp.float64 if precision == 'f64' else jnp.float32
    network = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), models.bind(module, variables))
    outputs = jax.jit(lambda n, x: n(x)._replace(maps=()))(network, jnp.asarray(images, dtype))
    running = network.running()
    distances = {
        path.replace('/', '_'): np.linalg.norm(running[path].var - moments.var)
        + np.linalg.norm(running[path].mean - moments.mean)
        for path, moments in outputs.moments.items()}
    rtol = 1e-9 if precision == 'f64' else 2e-5
    for ours, theirs in ((outputs.logits, 'logits'), (outputs.features, 'features')):
      if f'{name}/{theirs}_{precision}' not in values:
        continue  # MobileNetV2 keeps its features to itself.
      theirs = values[f'{name}/{theirs}_{precision}']
      np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())
    order = [path.replace('.', '_') for path in entry['bn_hook_order']]
    assert len(distances) == len(order)
    np.testing.assert_allclose(
        [distances[path] for path in order], values[f'{name}/r_feature_{precision}'], rtol=rtol)


@pytest.mark.parametrize('who', ['teacher', 'student'])
def test_wrn16_1_in_evaluation(who):
  module = models.create('wrn16_1', 10)
  variables = weights.to_variables(golden(f'{who}_wrn16_1'), module, (32, 32, 3))
  values = golden('wrn16_1_forward')
  outputs = jax.jit(models.Network.__call__)(
      models.bind(module, variables), jnp.asarray(nhwc(values['x'])))
  np.testing.assert_allclose(outputs.logits, values[f'{who}/logits_f32'], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(outputs.features, values[f'{who}/features_f32'], rtol=1e-5, atol=1e-6)
  assert [m.shape for m in outputs.maps] == [(8, 32, 32, 16), (8, 16, 16, 32), (8, 8, 8, 64)]


def test_wrn16_1_in_training(x64):
  values, arrays = golden('wrn16_1_forward'), golden('teacher_wrn16_1')
  module = models.create('wrn16_1', 10)
  network = as_float64(models.bind(module, weights.to_variables(arrays, module, (32, 32, 3))))
  outputs, stats = jax.jit(functools.partial(network.forward, train=True))(
      jnp.asarray(nhwc(values['x']), jnp.float64))
  np.testing.assert_allclose(
      outputs.logits, values['teacher/train_logits_f64'], rtol=1e-9, atol=1e-9)
  after = weights.from_variables({'params': {}, 'batch_stats': stats})
  for name, theirs in weights_of(values, 'teacher/after_train/').items():
    ours = after[name]
    if name.endswith('running_var'):
      # PyTorch moves the running variance by the batch's unbiased variance, Flax by the biased one.
      stage, first = (int(name[5]), '.0.bn1.' in name) if name.startswith('block') else (3, False)
      n = 8 * (32 // 2 ** max(stage - 1 - first, 0))**2
      kept = 0.9 * arrays[name].astype(np.float64)
      ours = kept + (ours - kept) * n / (n - 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradient_of_the_moments_distance(x64):
  values = golden('bn_loss')
  module = models.create('wrn16_1', 10)
  variables = weights.to_variables(golden('teacher_wrn16_1'), module, (32, 32, 3))
  network = as_float64(models.bind(module, variables))
  running = network.running()

  def distance(images):
    moments = network(images).moments
    return sum(jnp.linalg.norm(running[p].var - m.var) + jnp.linalg.norm(running[p].mean - m.mean)
               for p, m in moments.items())

  value, gradient = jax.jit(jax.value_and_grad(distance))(
      jnp.asarray(nhwc(values['x'][1]), jnp.float64))
  np.testing.assert_allclose(value, values['mmt0/loss_bn_f64'][1], rtol=1e-9)
  theirs = nhwc(values['mmt0/grad_x_f64'][1])
  np.testing.assert_allclose(gradient, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


@pytest.fixture
def generator_case(x64):
  values = golden('generator')
  module = models.Generator((32, 32, 3), width=16)
  variables = as_float64(weights.to_variables(weights_of(values, 'w/'), module, (64,)))
  return values, module, variables


def test_generator_forward(generator_case):
  values, module, variables = generator_case
  latents = jnp.asarray(values['z'], jnp.float64)
  images, new = jax.jit(functools.partial(module.apply, train=True, mutable=['batch_stats']))(
      {'params': variables['params']}, latents)
  np.testing.assert_allclose(images, nhwc(values['out_train_f64']), rtol=1e-9)
  batch = weights.from_variables({'params': {}, **new})
  for name, n in (
      ('conv_blocks.0', 8 * 64), ('conv_blocks.3', 8 * 256), ('conv_blocks.7', 8 * 1024)):
    # Moved from 0 and 1 here; there from the file's values, and by the unbiased variance.
    for moment, start, unbiased in (
        ('running_mean', 0, 1), ('running_var', np.float32(0.9), n / (n - 1))):
      moved = 0.9 * values[f'w/{name}.{moment}'].astype(np.float64) + (
          batch[f'{name}.{moment}'] - start) * unbiased
      np.testing.assert_allclose(moved, values[f'after_f64/{name}.{moment}'], rtol=1e-9, atol=1e-12)
  after = weights_of(values, 'w/') | weights_of(values, 'after_f64/')
  sampler = weights.to_variables(after, module, (64,))
  images = jax.jit(functools.partial(module.apply, train=False))(as_float64(sampler), latents)
  np.testing.assert_allclose(images, nhwc(values['out_eval_after_f64']), rtol=1e-6)


def test_generator_gradients(generator_case):
  values, module, variables = generator_case

  def dot(params, latents):
    images, _ = module.apply({'params': params}, latents, mutable=['batch_stats'])
    return (images * nhwc(values['cot'])).sum()

  params, latents = jax.jit(jax.grad(dot, argnums=(0, 1)))(
      variables['params'], jnp.asarray(values['z'], jnp.float64))
  np.testing.assert_allclose(latents, values['grad_z_f64'], rtol=1e-9, atol=1e-12)
  ours = weights.from_variables({'params': params})
  for name, theirs in weights_of(values, 'grad_f64/').items():
    np.testing.assert_allclose(
        ours[name], theirs, rtol=1e-6, atol=1e-7 * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize(('module', 'latents', 'count_', 'name'), [
    (models.Generator(), (256,), 2_328_899, 'Generator_nz256_ngf64_img32'),
    (models.Generator(), (512,), 4_426_051, 'Generator_nz512_ngf64_img32'),
    (models.Generator(stem_width=256), (256,), 4_581_955, None),
    (models.DFADGenerator(), (256,), 11_243_203, None),
    (models.SpatialGenerator(), (14, 14, 256), 1_398_403 - 805_952,
     'DeepGenerator_nz256_ngf64_img224')])
def test_generators_have_the_published_parameters(module, latents, count_, name):
  shapes = shapes_of(module, latents)
  assert count(shapes['params']) == count_
  assert set(module.first_layers) <= set(shapes['params'])
  if name:
    ours = weights.from_variables(
        jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes))
    theirs = {
        k: v for k, v in zoo()[name]['state_dict'] if 'Deep' not in name or not k.startswith('l1.')}
    assert {k: list(v.shape) for k, v in ours.items()} == theirs


def test_spatial_generator_scores_as_the_published_one(x64):
  values = golden('fast_imagenet_reptile')
  arrays = {k: v for k, v in weights_of(values, 'g0/').items() if not k.startswith('l1.')}
  module = models.SpatialGenerator(widths=(8, 8, 4, 4, 4))
  generator = as_float64(weights.to_variables(arrays, module, (2, 2, 16)))
  latents = jnp.asarray(nhwc(values['z0']), jnp.float64)
  images, _ = jax.jit(functools.partial(module.apply, mutable=['batch_stats']))(
      {'params': generator['params']}, latents)
  teacher = models.create('wrn16_1', 10)
  variables = weights.to_variables(golden('teacher_wrn16_1'), teacher, (32, 32, 3))
  network = as_float64(models.bind(teacher, variables, **CIFAR))
  running = network.running()
  distance = sum(np.linalg.norm(running[p].var - m.var) + np.linalg.norm(running[p].mean - m.mean)
                 for p, m in jax.jit(lambda x: network(x).moments)(images).items())
  np.testing.assert_allclose(distance, values['call1/loss_f64'][0, 1], rtol=1e-7)


@pytest.mark.parametrize('image_shape', [(28, 28, 1), (8, 20, 3)])
def test_generator_of_other_image_shapes(image_shape):
  module = models.Generator(image_shape, width=3)
  variables = drawn_variables(module, (7,))
  latents = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
  images, _ = jax.jit(functools.partial(module.apply, mutable=['batch_stats']))(
      {'params': variables['params']}, latents)
  assert images.shape == (5, *image_shape)
  assert images.min() > 0
  assert images.max() < 1
  assert images.std(0).min() > 0  # Every pixel depends on the latents.


@pytest.mark.parametrize(('kind', 'larger'), [
    (models.Generator, (12, 8)), (models.DFADGenerator, (16, 16))])
def test_images_of_other_sizes_are_cut_from_larger_ones(kind, larger):
  options = {'width': 3} if kind is models.Generator else {'widths': (6, 5, 4, 3, 2)}
  latents = jax.random.normal(jax.random.key(1), (2, 7))
  made = [toys.jit(kind((*size, 3), **options).init_with_output)(jax.random.key(0), latents)
          for size in ((11, 7), larger)]
  (images, variables), (whole, others) = made
  np.testing.assert_array_equal(images, whole[:, :11, :7])
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, others)


def test_dfads_images_are_its_tanh_moved_to_0_to_1():
  module = models.DFADGenerator((16, 16, 3), widths=(6, 5, 4, 3, 2))
  latents = jax.random.normal(jax.random.key(1), (2, 7))
  (images, variables) = toys.jit(module.init_with_output)(jax.random.key(0), latents)
  _, state = module.apply(
      variables, latents, mutable=['intermediates', 'batch_stats'],
      capture_intermediates=lambda found, _: found.name == 'conv')
  maps, = state['intermediates']['conv']['__call__']
  np.testing.assert_allclose(images, (np.tanh(maps) + 1) / 2, atol=1e-6)
  spread = lambda name: variables['params'][name]['kernel'].std()
  assert spread('linear') == pytest.approx(0.02, rel=0.1)
  assert variables['params']['bn1']['scale'].mean() == pytest.approx(1, abs=0.05)


def test_generator_is_channel_major():
  """The dense layer's outputs c * h * w + i * w + j are channel c of pixel (i, j)."""
  module = models.Generator((8, 12, 1), width=2)
  variables = drawn_variables(module, (1,))
  kernel = jnp.zeros((1, 4 * 2 * 3)).at[0, 2 * 6 + 1 * 3 + 2].set(1.0)
  params = variables['params'] | {'l1_0': {'kernel': kernel, 'bias': jnp.zeros(24)}}
  _, state = jax.jit(functools.partial(
      module.apply, mutable=['batch_stats', 'intermediates'],
      capture_intermediates=lambda m, _: m.name == 'conv_blocks_0'))(
          {'params': params}, jnp.array([[0.0], [1.0]]))
  normed = state['intermediates']['conv_blocks_0']['__call__'][0]
  changed = np.argwhere(np.abs(normed[1] - normed[0]) > 1e-3)
  np.testing.assert_array_equal(changed, [[1, 2, 2]])


def test_convnet_for_grey_images():
  module = models.create('convnet', 7)
  network = fresh(module, (28, 28, 1))
  outputs = jax.jit(models.Network.__call__)(
      network, jax.random.uniform(jax.random.key(1), (3, 28, 28, 1)))
  assert outputs.logits.shape == (3, 7)
  assert [m.shape[1:] for m in outputs.maps] == [
      (28, 28, 16), (14, 14, 32), (14, 14, 32), (7, 7, 64), (7, 7, 80)]
  np.testing.assert_allclose(outputs.features, outputs.maps[-1].mean((1, 2)), rtol=1e-5)
  assert len(outputs.moments) == 5


@pytest.mark.parametrize('name', ['resnet8', 'wrn16_1', 'convnet'])
def test_half_precision_keeps_parameters_moments_and_logits_in_float32(name):
  module = models.create(name, 5, dtype=jnp.bfloat16)
  network = fresh(module, (16, 16, 3))
  assert {leaf.dtype.name for leaf in jax.tree.leaves(network)} == {'float32'}
  images = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))
  outputs = jax.jit(models.Network.__call__)(network, images)
  assert {m.dtype.name for m in outputs.maps} == {'bfloat16'}
  leaves = jax.tree.leaves((outputs.logits, outputs.moments))
  assert {leaf.dtype.name for leaf in leaves} == {'float32'}
  exact = jax.jit(models.Network.__call__)(network.replace(module=models.create(name, 5)), images)
  np.testing.assert_allclose(
      outputs.logits, exact.logits, atol=0.05 * np.abs(exact.logits).max() + 0.02)


def test_padded_shortcut_subsamples_and_pads_on_both_sides():
  x = jnp.arange(1.0, 1 + 2 * 5 * 4 * 3).reshape(2, 5, 4, 3)
  out = resnet.shrink_and_pad(x, 8, 2)
  assert out.shape == (2, 3, 2, 8)
  np.testing.assert_array_equal(out[..., 2:5], x[:, ::2, ::2])
  assert not out[..., :2].any()
  assert not out[..., 5:].any()
  padded = shapes_of(models.create('resnet20', 10, shortcut='pad'))
  assert count(padded['params']) == 269_722  # He et al., table 6: 0.27M.


def test_vgg_pools_once_more_for_64_pixels():
  module = models.create('vgg8', 3)
  for size, last in ((32, 4), (64, 4), (48, 6)):
    maps = jax.eval_shape(
        lambda x: models.create_network(module, jax.random.key(0), x.shape[1:])(x).maps,
                          jnp.zeros((1, size, size, 3)))
    assert maps[-1].shape == (1, last, last, 512)


@pytest.mark.parametrize(('module', 'shape', 'leaf', 'std', 'uniform'), [
    (resnet.Block(48), (4, 4, 32), 'conv1/kernel', 1 / np.sqrt(3 * 9 * 32), True),
    (resnet.Block(48), (4, 4, 32), 'shortcut_0/kernel', 1 / np.sqrt(3 * 32), True),
    (resnet.WideBlock(48), (4, 4, 32), 'conv1/kernel', np.sqrt(2 / (9 * 48)), False),
    (models.create('resnet8', 900), (8, 8, 1), 'layer3_0/conv1/kernel', np.sqrt(2 / (9 * 64)),
     False),
    (models.create('resnet8', 900), (8, 8, 1), 'fc/bias', 1 / np.sqrt(3 * 64), True),
    (models.VGG(50, groups=((64,),)), (8, 8, 3), 'block0_0/kernel', np.sqrt(2 / (9 * 64)), False),
    (models.VGG(50, groups=((64,),)), (8, 8, 3), 'classifier/kernel', 0.01, False),
    (models.Generator((8, 8, 1), width=16), (40,), 'l1_0/kernel', 1 / np.sqrt(3 * 40), True),
    (models.Generator((8, 8, 200), width=4), (9,), 'conv_blocks_9/bias', 1 / np.sqrt(3 * 9 * 4),
     True)])
def test_initial_weights_are_spread_as_published(module, shape, leaf, std, uniform):
  def init(key):
    params = traverse_util.flatten_dict(module.init(key, jnp.zeros((1, *shape)))['params'], sep='/')
    return params[leaf], {k: v for k, v in params.items() if 'bn' in k or k.endswith('scale')}

  drawn, norms = jax.jit(init)(jax.random.key(3))  # Compiles only the results.
  np.testing.assert_allclose(drawn.std(), std, rtol=0.06)
  assert (np.abs(drawn).max() <= np.sqrt(3) * std * 1.0001) == uniform
  assert all((values == path.endswith('scale')).all() for path, values in norms.items())


@pytest.mark.parametrize('name', sorted({*models.names()} - {*ZOO, *IMAGENET}))
def test_create_gives_a_network_for_every_other_name(name):
  module = models.create(name, 6)
  logits, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((3, 40, 33, 2)))
  is_dense = name.startswith(('deeplab', 'drn', 'espnet'))
  assert logits.shape == ((3, 40, 33, 6) if is_dense else (3, 6))


def test_create_knows_any_wide_resnet():
  assert models.create('wrn28_10', 10) == models.WideResNet(10, 28, 10)


@pytest.mark.parametrize(('name', 'message'), [
    ('resent34', "Unknown model 'resent34'. Did you mean 'resnet34'? Known: convnet, "),
    ('xyz', "Unknown model 'xyz'. Known: convnet, "),
    ('wrn17_1', 'A wide ResNet has 6n + 4 layers (10, 16, 22, 28, 40, ...), not 17.')])
def test_create_refuses_what_is_not_there(name, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    models.create(name, 10)


def test_modules_refuse_what_they_cannot_be():
  with pytest.raises(ValueError, match=r'6n \+ 2 layers \(8, 14, 20, ...\), not 18'):
    models.ThinResNet(10, depth=18)
  with pytest.raises(ValueError, match=r"Unknown shortcut 'identity'\. Known: projection, pad"):
    shapes_of(models.create('resnet20', 10, shortcut='identity'))
  with pytest.raises(ValueError, match=r'2 widths \(4, 5\) need as many strides, not \(1,\)'):
    models.ConvNet(10, widths=(4, 5), strides=(1,))


@pytest.mark.parametrize('name', [
    'convnet', 'vgg8', 'vgg11_bn', 'resnet18', 'resnet18_imagenet', 'resnet8', 'wrn16_1',
    'mobilenetv2_imagenet', 'efficientnet_lite0'])
def test_a_head_may_have_a_hidden_layer(name):
  module = models.create(name, 5, head_width=7)
  images = jnp.zeros((1, 32, 32, 3))
  params = jax.eval_shape(module.init, jax.random.key(0), images)['params']
  hidden, last = (jax.tree.map(jnp.shape, params[layer])
                  for layer in (f'{module.head}_hidden', module.head))
  assert hidden['bias'] == (7,)
  assert last == {'kernel': (7, 5), 'bias': (5,)}
