"""Networks that predict a class per pixel, and their building blocks."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from conftest import SHARED, golden, shared_loader
from flax import linen as nn
from golden_networks import nhwc, recipe, shapes_of

from configs import camvid
from dfkd_jax import evaluate, models, weights
from dfkd_jax.config import build
from dfkd_jax.config.records import resolve
from dfkd_jax.models import dense_layers, espnet

ESPNET = SHARED / 'teachers' / 'espnet_p2_q8_camvid.pth'


def shapes(name, num_classes, size=(40, 56), **options):
  module = models.create(name, num_classes, **options)
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  return jax.eval_shape(module.init_with_output, jax.random.key(0), images)


def count(variables):
  return (sum(leaf.size for leaf in jax.tree.leaves(variables['params'])),
          len(jax.tree.leaves(variables['batch_stats'])) // 2)


@pytest.mark.parametrize(('name', 'num_classes', 'options', 'expected'), [
    ('espnet', 12, {}, (354_517, 21)),  # the authors' file
    ('espnet', 20, {'skip': 'plain'}, (364_569, 21)),
    ('drn', 12, {}, (89_448, 11)),
    # torchvision: 42,004,074 less its auxiliary head of 2,365,205
    ('deeplabv3_resnet50', 21, {}, (39_638_869, 60)),
    ('deeplabv3_mobilenet', 13, {}, (5_111_821, 58)),
])
def test_sizes(name, num_classes, options, expected):
  logits, variables = shapes(name, num_classes, **options)
  assert count(variables) == expected
  assert logits.shape == (2, 40, 56, num_classes)


@pytest.mark.parametrize(('probe', 'gain', 'options'), [
    ('deeplabv3_resnet50', 1.0, {}),
    ('deeplabv3_mobilenet_fast', 2.0, {}),
    ('deeplabv3_mobilenet_dfad', 2.0, dict(rates=(12, 24, 32), plan='dfad', stem_padding=1))])
def test_deeplab_gives_the_logits_of_pytorch(probe, gain, options):
  """Of torchvision's DeepLabv3, and of MobileNetV2 in PyTorch by the text of both code bases."""
  values, size = golden('dense_logits'), (67, 90)
  module = models.create(probe.removesuffix('_fast').removesuffix('_dfad'), 7, **options)
  empty = jax.tree.map(
      lambda s: np.broadcast_to(np.float32(0), s.shape), shapes_of(module, (*size, 3)))
  shapes = {name: array.shape for name, array in weights.from_variables(empty).items()}
  variables = weights.to_variables(recipe(shapes.items(), gain), module, (*size, 3))
  low = values['low']  # Noise of few pixels, which are enlarged.
  images = low.repeat(14, 2).repeat(23, 3)[:, :, :size[0], :size[1]]
  logits = toys.jit(module.apply)(variables, nhwc(images))
  found = np.moveaxis(np.asarray(logits), -1, 1)[:, :, ::4, ::5]
  np.testing.assert_allclose(found, values[probe], atol=1e-4 * np.abs(values[probe]).max(), rtol=0)


@pytest.mark.parametrize('name', ['drn', 'espnet', 'espnet_c', 'deeplabv3_mobilenet'])
def test_any_size_keeps_its_size(name):
  logits, _ = shapes(name, 5, size=(37, 51))
  assert logits.shape == (2, 37, 51, 5)
  assert logits.dtype == jnp.float32


def test_a_dilated_resnet_adds_the_logits_of_two_stages():
  module = models.create('drn', 5, widths=(3, 4, 6), rates=(1, 3))
  images = jax.random.normal(jax.random.key(1), (2, 16, 24, 3))
  variables = module.init(jax.random.key(0), images)
  params = variables['params']
  assert sorted(name for name in params if name.startswith('layer')) == [
      'layer2_0', 'layer3_0', 'layer3_1']
  without = lambda name: jax.tree.map(jnp.zeros_like, params[name])
  logits = {name: module.apply(variables | {'params': params | {name: without(name)}}, images)
            for name in ('score4', 'score8')}
  assert all(np.abs(part).max() > 1e-3 for part in logits.values())
  np.testing.assert_allclose(
      module.apply(variables, images), logits['score4'] + logits['score8'], atol=1e-5)


@pytest.mark.parametrize('num_classes', [2, 3, 5, 7])
def test_espnet_takes_few_classes(num_classes):
  logits, variables = shapes('espnet', num_classes)
  assert logits.shape == (2, 40, 56, num_classes)
  branches = variables['params']['combine_l2_l3_1']
  widths = [branches[name]['kernel'].shape[-1] for name in branches if name[0] == 'd']
  assert sum(widths) == num_classes
  assert len(widths) == min(num_classes, 5)


@pytest.mark.parametrize('size', [2, 4])
def test_a_transposed_convolution_is_the_sum_over_its_taps(size):
  x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
  kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 4))
  padding = (size - 2) // 2
  full = np.zeros((2, 2 * 2 + size, 2 * 4 + size, 3))
  for i in range(3):
    for j in range(5):
      full[:, 2 * i:2 * i + size, 2 * j:2 * j + size] += np.einsum(
          'bi,pqoi->bpqo', x[:, i, j], kernel)
  expected = full[:, padding:full.shape[1] - padding, padding:full.shape[2] - padding]
  module = dense_layers.TransposedConv(3, size)
  np.testing.assert_allclose(module.apply({'params': {'kernel': kernel}}, x), expected, atol=1e-5)


@pytest.mark.parametrize('size', [(6, 8), (7, 9)])
def test_average_pooling_counts_zeros_beyond_the_border(size):
  x = jax.random.normal(jax.random.key(0), (2, *size, 3))
  expected = nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=True)
  np.testing.assert_allclose(dense_layers.average_pool(x), expected, atol=1e-6)


def test_prelu_has_a_slope_a_channel():
  x = jnp.array([[-2.0, 3.0], [4.0, -5.0]])
  weight = jnp.array([0.5, 0.1])
  result = dense_layers.PReLU().apply({'params': {'weight': weight}}, x)
  np.testing.assert_allclose(result, [[-1.0, 3.0], [4.0, -0.5]])


def test_padding_repeats_the_last_row_and_column():
  x = jnp.arange(6.0).reshape(1, 2, 3, 1)
  padded = dense_layers.pad_to_multiple(x, 4)[0, :, :, 0]
  np.testing.assert_array_equal(padded, [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]])


def test_branches_of_an_esp_block_are_added_up_from_the_smallest_rate():
  block = espnet.ESPBlock(11)
  x = jax.random.normal(jax.random.key(0), (1, 40, 36, 4))
  variables = block.init(jax.random.key(1), x)
  params = variables['params']
  conv = lambda x, name, rate: jax.lax.conv_general_dilated(
      x, params[name]['kernel'], (1, 1), [(rate, rate)] * 2 if rate else [(0, 0)] * 2,
      rhs_dilation=(max(rate, 1),) * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  reduced = conv(x, 'c1_conv', 0)
  d1, d2, d4, d8, d16 = (conv(reduced, f'd{rate}_conv', rate) for rate in (1, 2, 4, 8, 16))
  assert d1.shape[-1] == 3
  assert d2.shape[-1] == 2
  y = jnp.concatenate([d1, d2, d2 + d4, d2 + d4 + d8, d2 + d4 + d8 + d16], -1)
  y /= np.sqrt(1 + 1e-3)  # fresh running moments
  np.testing.assert_allclose(block.apply(variables, x), jnp.where(y > 0, y, y / 4), atol=1e-5)


@pytest.mark.skipif(not ESPNET.exists(), reason='needs the shared public teachers')
def test_a_published_espnet_is_read_by_its_names():
  module = models.create('espnet', 12)
  variables = weights.load(ESPNET, module, (48, 64, 3))
  stored = weights.read(ESPNET)
  kernel = variables['params']['encoder']['level2_0']['d4_conv']['kernel']
  np.testing.assert_array_equal(
      kernel, stored['encoder.level2.0.d4.conv.weight'].transpose(2, 3, 1, 0))
  kernel = variables['params']['encoder']['down2']['d4_conv']['kernel']
  np.testing.assert_array_equal(
      kernel, stored['encoder.level2_0.d4.conv.weight'].transpose(2, 3, 1, 0))


@pytest.mark.skipif(not ESPNET.exists(), reason='needs the shared public teachers')
@pytest.mark.parametrize(('every', 'expected', 'with_void'), [
    (39, 0.5945, 0.5837), pytest.param(1, 0.5687, 0.5538, marks=pytest.mark.exhaustive)])
def test_the_published_espnet_scores_as_published(every, expected, with_void):
  """56.87 on the 233 test images of CamVid, void dropped; 55.38 with void. Of every 39th: ours."""
  images, masks = shared_loader().camvid('test', '360x480')
  config = camvid.get_config('fast_dfkd')
  config.teacher.source = str(ESPNET)
  settings = resolve(config)
  metrics = evaluate.evaluate(build.trained_network(settings.teacher),
                              (images[::every], masks[::every]), task=settings.task, batch_size=6)
  assert metrics['mean_iou'] == pytest.approx(expected, abs=1e-3)
  assert metrics['mean_iou_void'] == pytest.approx(with_void, abs=1e-3)


def test_an_espnet_of_ours_is_read_from_its_own_file(tmp_path):
  """Its blocks `level3_0` are not the authors' down-samplers of this name."""
  module = models.create('espnet', 4, p=1, q=2, widths=(3, 5, 6))
  network = models.create_network(module, jax.random.key(2), (16, 24, 3))
  variables = {'params': network.params, 'batch_stats': network.batch_stats}
  weights.save_safetensors(tmp_path / 'student.safetensors', variables)
  again = weights.load(tmp_path / 'student.safetensors', module, (16, 24, 3))
  jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_logits_come_back_to_the_size_of_the_images():
  """Where the network takes larger images, by the mean of each block; else between centres."""
  module = models.create('drn', 5, widths=(4, 4, 4), blocks=0, rates=())
  images = jax.random.uniform(jax.random.key(1), (2, 12, 20, 3))
  network = models.create_network(module, jax.random.key(0), (12, 20, 3), resize=(24, 40))
  plain = network.replace(resize=None)
  larger = plain(jax.image.resize(images, (2, 24, 40, 3), 'linear')).logits
  blocks = larger.reshape(2, 12, 2, 20, 2, 5).mean((2, 4))
  np.testing.assert_allclose(network(images).logits, blocks, rtol=1e-4, atol=1e-5)
  odd = network.replace(resize=(18, 30))(images).logits
  assert odd.shape == (2, 12, 20, 5)
  assert np.corrcoef(odd.ravel(), blocks.ravel())[0, 1] > 0.8
