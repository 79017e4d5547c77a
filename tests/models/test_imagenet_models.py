"""Networks for ImageNet: logits and names of other libraries, and recomputed blocks."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from conftest import golden
from golden_networks import count, drawn_variables, nhwc, recipe, shapes_of
from safetensors.numpy import save_file

from dfkd_jax import models, weights
from dfkd_jax.models import generator, resnet, vgg

CLASSES = 23
MODEL_OF = {
    'efficientnet_lite0_torch': 'efficientnet_lite0', 'resnet50_imagenet_timm': 'resnet50_imagenet'}
# By the name of the probe: the model's options, gain of the recipe, height and width.
PROBES = {
    'resnet34_imagenet': ({}, 1.0, (75, 58)), 'resnet50_imagenet_timm': ({}, 1.0, (75, 58)),
    'efficientnet_lite0': ({}, 2.0, (75, 58)), 'efficientnet_lite2': ({}, 2.0, (75, 58)),
    'efficientnet_lite1': ({}, 2.0, (75, 58)),
    'efficientnet_lite0_torch': ({'padding': 'torch', 'epsilon': 1e-5}, 2.0, (75, 58)),
    'vgg11_bn': ({}, 2.0, (75, 58)), 'vgg13_bn': ({}, 2.0, (75, 58)),
    'vgg16_bn': ({}, 2.0, (257, 96)),
    'vgg19_bn': ({}, 2.0, (75, 58))}
TIMM = {
    'resnet34': 'resnet34_imagenet', 'tf_efficientnet_lite1': 'efficientnet_lite1',
    'efficientnet_lite0': 'efficientnet_lite0_torch'}


def images_of(low, height, width):
  """Noise of few pixels, enlarged: [B, C, h, w] to [B, C, H, W]."""
  times = [-(-size // pixels) for size, pixels in zip((height, width), low.shape[2:], strict=True)]
  return low.repeat(times[0], 2).repeat(times[1], 3)[:, :, :height, :width]


def make(probe):
  options, gain, size = PROBES[probe]
  return models.create(MODEL_OF.get(probe, probe), CLASSES, **options), gain, size


def state_of(module, size):
  """Names and shapes in PyTorch's layout."""
  shapes = jax.tree.map(
      lambda s: np.broadcast_to(np.float32(0), s.shape), shapes_of(module, (*size, 3)))
  return {name: array.shape for name, array in weights.from_variables(shapes).items()}


def assert_logits(module, size, arrays, low, expected):
  variables = weights.to_variables(arrays, module, (*size, 3))
  logits = toys.jit(module.apply)(variables, nhwc(images_of(low, *size)))
  np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


# Deeper or wider than another network of the same blocks.
LARGE = ('vgg13_bn', 'vgg16_bn', 'vgg19_bn', 'efficientnet_lite1', 'efficientnet_lite2',
         'resnet34_imagenet')


@pytest.mark.parametrize('probe', [
    pytest.param(probe, marks=pytest.mark.exhaustive) if probe in LARGE else probe
    for probe in PROBES])
def test_logits_are_those_of_torchvision_and_timm(probe):
  values, (module, gain, size) = golden('imagenet_logits'), make(probe)
  arrays = recipe(state_of(module, size).items(), gain)
  assert_logits(module, size, arrays, values['low'], values[probe])


@pytest.mark.parametrize('name', TIMM)
def test_logits_are_those_of_timm_itself(name):
  torch = pytest.importorskip('torch', reason='PyTorch is not at hand: pip install dfkd_jax[timm]')
  timm = pytest.importorskip('timm', reason='timm is not at hand: pip install dfkd_jax[timm]')
  module, gain, size = make(TIMM[name])
  network = timm.create_model(name, num_classes=CLASSES).eval()
  arrays = recipe([(key, tuple(value.shape)) for key, value in network.state_dict().items()], gain)
  network.load_state_dict(
      {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()})
  low = np.random.default_rng(3).normal(size=(2, 3, 5, 4)).astype(np.float32)
  with torch.no_grad():
    expected = network(torch.from_numpy(images_of(low, *size))).numpy()
  assert_logits(module, size, arrays, low, expected)


def test_sizes_of_the_keras_resnet():
  shapes = shapes_of(models.create('resnet50_keras', 1000), (224, 224, 3))
  # keras.applications' own count.
  assert count(shapes['params']) + count(shapes['batch_stats']) == 25_636_712


def test_strides_lie_in_the_convolution_that_is_asked_for():
  def inner(stride_in):
    block = resnet.Block(8, 2, bottleneck=True, stride_in=stride_in)
    sown = jax.eval_shape(functools.partial(block.init_with_output, capture_intermediates=True),
                          jax.random.key(0), jnp.zeros((1, 6, 10, 4)))[1]['intermediates']
    return [sown[f'conv{i}']['__call__'][0].shape[1:3] for i in (1, 2, 3)]

  assert inner('3x3') == [(6, 10), (3, 5), (3, 5)]
  assert inner('1x1') == [(3, 5)] * 3


@pytest.mark.parametrize(('height', 'width'), [(7, 7), (2, 3), (9, 14), (16, 1)])
def test_adaptive_pooling_takes_means_of_ranges(height, width):
  x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
  ours = vgg.adaptive_mean_pool(jnp.asarray(x), 7)
  for i in range(7):
    rows = x[:, i * height // 7:-(-(i + 1) * height // 7)]
    for j in range(7):
      expected = rows[:, :, j * width // 7:-(-(j + 1) * width // 7)].mean((1, 2))
      np.testing.assert_allclose(ours[:, i, j], expected, rtol=1e-5, atol=1e-6)


def test_widths_and_depths_scale():
  half = shapes_of(models.create('mobilenetv2_imagenet', 1000, width=0.5), (32, 32, 3))
  assert count(half['params']) == 1_968_680  # The published 0.5 model's 1.97M.
  lite = [shapes_of(models.create(f'efficientnet_lite{i}', 1000), (32, 32, 3)) for i in range(3)]
  # 4.7M, 5.4M, 6.1M.
  assert [count(v['params']) for v in lite] == [4_652_008, 5_416_680, 6_092_072]
  names = [weights.from_variables(empty(variables)) for variables in lite]
  assert [sum('mean' in key for key in keys) for keys in names] == [49, 64, 64]


def empty(shapes):
  return jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)


@pytest.mark.parametrize('module', [
    models.ImageNetResNet(4, (1, 2), bottleneck=True, width=4),
    models.ImageNetVGG(4, ((3,), (4, 5)), hidden=6)],
    ids=lambda module: type(module).__name__)
def test_blocks_computed_anew_change_nothing_but_memory(module, x64):
  """Logits, maps, moments, running moments and gradients, with and without."""
  images = jnp.asarray(np.random.default_rng(1).normal(size=(3, 36, 40, 3)))
  network = jax.tree.map(
      lambda leaf: leaf.astype(jnp.float64),
      models.bind(module, drawn_variables(module, (36, 40, 3))))

  def loss(params, images, remat):
    copy = network.replace(module=module.clone(remat=remat), params=params)
    outputs, stats = copy.forward(images, train=True)
    moments = sum(jnp.sin(m.mean).sum() + jnp.log1p(m.var).sum() for m in outputs.moments.values())
    return moments + jnp.sin(outputs.logits).sum(), (outputs, stats)

  run = lambda remat: jax.value_and_grad(
      functools.partial(loss, remat=remat), argnums=(0, 1), has_aux=True)
  plain, anew = toys.jit(lambda *both: (run(False)(*both), run(True)(*both)))(
      network.params, images)
  assert jax.tree.structure(plain) == jax.tree.structure(anew)
  assert sorted(plain[0][1][0].moments) == list(network.running())
  for ours, theirs in zip(jax.tree.leaves(anew), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9 * (1 + np.abs(theirs).max()))


@pytest.mark.parametrize('module', [models.MobileNetV2(4), models.EfficientNetLite(4)],
                         ids=lambda module: type(module).__name__)
def test_paths_of_blocks_computed_anew_stay_the_same(module):
  """Variables and sown values; larger networks share the code of the two tested above."""
  network = models.bind(module, shapes_of(module))
  images = jax.ShapeDtypeStruct((2, 33, 40, 3), jnp.float32)
  forward = functools.partial(models.Network.forward, train=True)
  plain, anew = (
      jax.eval_shape(forward, network.replace(module=module.clone(remat=remat)), images)
      for remat in (False, True))
  assert plain == anew
  assert len(plain[0].maps) == 7
  assert list(plain[0].moments) == list(network.running())
  assert shapes_of(module.clone(remat=True)) == shapes_of(module)


def kept_for_the_backward_pass(module, shape):
  """Numbers of the arrays that a gradient with respect to the images needs of the forward pass."""
  variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))
  vjp = lambda variables, x: jax.vjp(lambda x: module.apply(variables, x), x)[1]
  kept = jax.eval_shape(vjp, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
  return sum(leaf.size for leaf in jax.tree.leaves(kept)) - count(variables)


@pytest.mark.parametrize(('module', 'shape'), [
    (models.ImageNetResNet(4, (3, 3), width=8), (2, 64, 64, 3)),
    (models.MobileNetV2(4), (2, 64, 64, 3)),
    (models.SpatialGenerator((8, 8, 8)), (2, 9, 8, 4))],
    ids=lambda value: getattr(type(value), '__name__', ''))
def test_only_what_goes_into_blocks_is_kept(module, shape):
  if isinstance(module, models.SpatialGenerator):
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))
    size = lambda m: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(
        lambda v, z: jax.vjp(lambda z: m.apply(v, z, train=False), z)[1], variables,
        jax.ShapeDtypeStruct(shape, jnp.float32))))
  else:
    size = functools.partial(kept_for_the_backward_pass, shape=shape)
  assert size(module.clone(remat=True)) < 0.6 * size(module)


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('resnet50_imagenet', {'stride_in': '2x2'}, "Unknown stride_in '2x2'. Known: 3x3, 1x1."),
    ('efficientnet_lite0', {'padding': 'valid'},
     "Unknown padding 'valid'. Known: same, torch.")])
def test_networks_refuse_what_they_cannot_be(name, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    shapes_of(models.create(name, 10, **options))


def test_spatial_generator_knows_its_latents():
  spatial = models.SpatialGenerator()
  assert spatial.latent_shape((224, 224, 3), 256) == (14, 14, 256)
  assert models.SpatialGenerator((4, 5, 6), channels=1).latent_shape((20, 12, 1), 7) == (5, 3, 7)
  assert spatial.latent_shape((224, 200, 3), 256) == (14, 13, 256)
  with pytest.raises(ValueError, match='images of 3 channels, not 1'):
    spatial.latent_shape((32, 32, 1), 256)
  with pytest.raises(ValueError, match=r"Unknown last stage 'cheap'\. Known: conv, subpixel"):
    models.SpatialGenerator(last='cheap')
  with pytest.raises(ValueError, match=r"'subpixel' needs at least 2 widths, not \(4,\)"):
    models.SpatialGenerator((4,), last='subpixel')


@pytest.mark.parametrize('last', ['conv', 'subpixel'])
def test_spatial_generator_of_either_last_stage(last):
  module = models.SpatialGenerator((5, 4, 3), last=last)
  latents = jax.random.normal(jax.random.key(1), (2, *module.latent_shape((20, 12, 3), 7)))
  plain, anew = toys.jit(lambda latents: [
      m.init_with_output(jax.random.key(0), latents)
      for m in (module, module.clone(remat=True))])(latents)
  assert plain[0].shape == (2, 20, 12, 3)
  assert 0 < plain[0].min() < plain[0].max() < 1
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), plain, anew)


def test_subpixels_start_alike_and_lie_where_they_belong():
  x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))

  class Head(generator.nn.Module):
    dtype: None = None

    @generator.nn.compact
    def __call__(self, x):
      return generator._to_image(self, x, 3, 7, 2)

  images, _ = Head().init_with_output(jax.random.key(1), x)
  images = images.reshape(2, 3, 2, 5, 2, 3)
  np.testing.assert_allclose(
      images, np.broadcast_to(images[:, :, :1, :, :1], images.shape), rtol=1e-6)
  # Outputs are ordered by row, column and channel within the four pixels.
  bias = jnp.arange(12.0) / 10
  params = {'conv_blocks_7': {'kernel': jnp.zeros((3, 3, 4, 12)), 'bias': bias}}
  images = Head().apply({'params': params}, x)
  np.testing.assert_allclose(images[1, 2:4, 4:6], jax.nn.sigmoid(bias.reshape(2, 2, 3)), rtol=1e-6)


def lukemelas(state):
  """Our EfficientNet's arrays under lukemelas' names."""
  outside = {
      'conv_stem': '_conv_stem', 'bn1': '_bn0', 'conv_head': '_conv_head', 'bn2': '_bn1',
      'classifier': '_fc'}
  matches = [re.match(r'blocks\.(\d+)\.(\d+)', key) for key in state]
  blocks = sorted({tuple(map(int, match.groups())) for match in matches if match})
  first = {'conv_dw': '_depthwise_conv', 'bn1': '_bn1', 'conv_pw': '_project_conv', 'bn2': '_bn2'}
  other = {'conv_pw': '_expand_conv', 'bn1': '_bn0', 'conv_dw': '_depthwise_conv', 'bn2': '_bn1',
           'conv_pwl': '_project_conv', 'bn3': '_bn2'}
  renamed = {}
  for key, array in state.items():
    if match := re.fullmatch(r'blocks\.(\d+)\.(\d+)\.(\w+)\.(\w+)', key):
      at = int(match[1]), int(match[2])
      part = (first if at[0] == 0 else other)[match[3]]
      renamed[f'_blocks.{blocks.index(at)}.{part}.{match[4]}'] = array
    else:
      module, leaf = key.split('.')
      renamed[f'{outside[module]}.{leaf}'] = array
  return renamed


def keras(state, style):
  """A ResNet's arrays under either of Keras' names, in its layout."""
  leaves = {'running_mean': 'moving_mean', 'running_var': 'moving_variance'}
  renamed = {}
  for key, array in state.items():
    module, _, leaf = key.rpartition('.')
    norm = 'bn' in module or module.endswith('downsample.1')
    leaf = leaves.get(leaf) or (leaf if leaf == 'num_batches_tracked' else (
        {'weight': 'gamma', 'bias': 'beta'} if norm
        else {'weight': 'kernel', 'bias': 'bias'})[leaf])
    if leaf == 'num_batches_tracked':
      continue
    if match := re.match(r'layer(\d)\.(\d)\.(?:(?:conv|bn)(\d)|downsample)', module):
      stage, block, at = int(match[1]) + 1, int(match[2]), int(match[3] or 0)
      branch = '1' if not at else f'2{" abc"[at]}'
      old = f'{"bn" if norm else "res"}{stage}{"abcdef"[block]}_branch{branch}'
      new = f'conv{stage}_block{block + 1}_{at}_{"bn" if norm else "conv"}'
    else:
      old = {'conv1': 'conv1', 'bn1': 'bn_conv1', 'fc': 'fc1000'}[module]
      new = {'conv1': 'conv1_conv', 'bn1': 'conv1_bn', 'fc': 'predictions'}[module]
    array = np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array
    layer = old if style == 'old' else new
    renamed[f'{layer}/{layer}/{leaf}:0' if style == 'new' else f'{layer}/{leaf}'] = array
  return renamed


@pytest.mark.parametrize(('module', 'dialect'), [
    (models.EfficientNetLite(3, width=0.5, depth=1.2), lukemelas),
    *[(models.ImageNetResNet(3, (2, 1, 2), bottleneck=True, width=4, conv_bias=True),
       functools.partial(keras, style=style)) for style in ('old', 'new')]],
    ids=['lukemelas', 'old', 'new'])
def test_names_of_other_code_bases(module, dialect, tmp_path):
  rng = np.random.default_rng(0)
  state = {
      k: rng.uniform(1, 2, shape).astype(np.float32)
      for k, shape in state_of(module, (32, 32)).items()}
  theirs = dialect(state)
  assert not {k for k in theirs if k in state}
  translated = weights.translate_names(theirs)
  expected = {k: v for k, v in state.items() if 'tracked' not in k}
  assert expected.keys() <= translated.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(translated[name], array, err_msg=name)
  save_file(
      {k: np.ascontiguousarray(v) for k, v in theirs.items()}, tmp_path / 'w')
  jax.tree.map(np.testing.assert_array_equal, weights.load(tmp_path / 'w', module, (32, 32, 3)),
               weights.to_variables(state, module, (32, 32, 3)))


def test_depthwise_kernels_of_keras_keep_their_channels():
  kernel = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
  out = weights.translate_names({'dw/depthwise_kernel': kernel, 'dw/bias': np.zeros(20)})
  assert out['dw.weight'].shape == (20, 1, 2, 3)
  np.testing.assert_array_equal(out['dw.weight'][3 * 5 + 2, 0], kernel[:, :, 3, 2])


def test_own_names_pass():
  names = {
      'conv1.weight': np.zeros(1), 'blocks.0.0.conv_dw.weight': np.zeros(1),
      'odd/name': np.zeros(1)}
  assert weights.translate_names(names) == names
