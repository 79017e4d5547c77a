"""Weights as the variables of a module: layouts, dtypes, and one line if they do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED, golden, shared_loader
from flax import linen as nn
from safetensors import numpy as safetensors_numpy
from torch_files import saved

from dfkd_jax import models, weights


def random_variables(module, image_shape):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
  return jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 2, s.shape), jnp.float32), shapes)


MODULES = [
    (models.create('wrn16_2', 7), (8, 12, 3)),
    (models.create('resnet8', 5, shortcut='pad'), (8, 8, 2)),
    (models.VGG(3, groups=((4, 5), (6,))), (8, 8, 1)),
    (models.ResNet(4, (1, 2), bottleneck=True, width=8), (8, 8, 3)),
    (models.Generator((8, 12, 1), width=5), (7,)),
    (models.SpatialGenerator((3, 4, 5)), (2, 3, 6)),
    (models.create('convnet', 10), (28, 28, 1))]


def assert_same(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(('module', 'image_shape'), MODULES)
def test_variables_survive_both_layouts(module, image_shape, tmp_path):
  variables = random_variables(module, image_shape)
  state_dict = weights.from_variables(variables)
  assert_same(weights.to_variables(state_dict, module, image_shape), variables)
  weights.save_safetensors(tmp_path / 'w', variables, {'accuracy': '0.93'})
  assert_same(weights.load(tmp_path / 'w', module, image_shape), variables)
  assert weights.read_metadata(tmp_path / 'w') == {'accuracy': '0.93'}
  (tmp_path / 'torch').write_bytes(saved('legacy', lambda tree: {'net': tree}, state_dict))
  assert_same(weights.load(tmp_path / 'torch', module, image_shape), variables)


def test_half_precision_files_load_in_float32(tmp_path):
  module, image_shape = MODULES[0]
  variables = random_variables(module, image_shape)
  for dtype in ('float16', None):
    weights.save_safetensors(tmp_path / str(dtype), variables, dtype=dtype)
  assert (tmp_path / 'float16').stat().st_size < 0.55 * (tmp_path / 'None').stat().st_size
  loaded = weights.load(tmp_path / 'float16', module, image_shape)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {'float32'}
  assert_same(loaded['batch_stats'], variables['batch_stats'])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4), loaded, variables)
  assert weights.read(tmp_path / 'float16')['params.fc.kernel'].dtype == np.float16


def test_kernels_are_transposed_as_the_layers_compute():
  """By hand: a convolution in PyTorch's layout correlates weight[o, i] with channel i."""
  module, image_shape = models.create('convnet', 4, widths=(2,), strides=(1,)), (3, 3, 2)
  state_dict = weights.from_variables(random_variables(module, image_shape))
  variables = weights.to_variables(state_dict, module, image_shape)
  image = np.random.default_rng(1).normal(size=(1, 3, 3, 2)).astype(np.float32)
  _, state = module.apply(variables, image, capture_intermediates=True, mutable=['intermediates'])
  centre = state['intermediates']['conv1']['__call__'][0][0, 1, 1]
  np.testing.assert_allclose(
      centre, np.einsum('oiyx,yxi->o', state_dict['conv1.weight'], image[0]), rtol=1e-5)
  features = state['intermediates']['features'][0][0]
  logits = state['intermediates']['__call__'][0][0]
  by_hand = state_dict['fc.weight'] @ features + state_dict['fc.bias']
  np.testing.assert_allclose(logits, by_hand, rtol=1e-5)


def changed(**changes):
  module, image_shape = MODULES[1]
  state_dict = weights.from_variables(random_variables(module, image_shape)) | changes
  return {k: v for k, v in state_dict.items() if v is not None}, module, image_shape


@pytest.mark.parametrize(('changes', 'message'), [
    ({'fc.weight': np.zeros((6, 64))}, r'fc\.weight has the shape \(64, 6\), must have \(64, 5\)'),
    ({'layer1.0.bn1.running_mean': None},
     r'Missing parameter batch_stats/layer1_0/bn1/mean \(16,\)'),
    ({'layer1.7.conv1.weight': np.zeros((1, 2, 3, 3))},
     r'Unexpected parameter layer1\.7\.conv1\.weight \(1, 2, 3, 3\): ThinResNet has none'),
    ({'fc.bias': np.array([0, np.nan, 0, np.inf, 0])},
     r'fc\.bias holds 2 values that are not finite in float32'),
    ({'fc.bias': np.array([0, 0, 1e300, 0, 0])},
     r'fc\.bias holds 1 values that are not finite in float32'),
    ({'conv1.weight': np.zeros((16, 2, 3, 3), np.int8)},
     r'conv1\.weight is int8, not floating-point')])
def test_weights_that_do_not_fit_are_refused(changes, message, tmp_path):
  state_dict, module, image_shape = changed(**changes)
  with pytest.raises(ValueError, match=message):
    weights.to_variables(state_dict, module, image_shape)
  (tmp_path / 'w').write_bytes(safetensors_numpy.save(state_dict))
  with pytest.raises(ValueError, match=message):
    weights.load(tmp_path / 'w', module, image_shape)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda v: v['params'].pop('fc'), r'Missing parameter params/fc/bias \(5,\)'),
    (lambda v: v['params'].update(head={'bias': jnp.zeros(3)}),
     r'Unexpected parameter params\.head\.bias \(3,\)'),
    (lambda v: v['params']['fc'].update(bias=jnp.zeros(3)),
     r'params\.fc\.bias has the shape \(3,\), must have \(5,\)')])
def test_own_files_that_do_not_fit_are_refused(change, message, tmp_path):
  module, image_shape = MODULES[1]
  variables = random_variables(module, image_shape)
  change(variables)
  weights.save_safetensors(tmp_path / 'w', variables)
  with pytest.raises(ValueError, match=message):
    weights.load(tmp_path / 'w', module, image_shape)


def test_the_last_layer_may_have_another_name():
  state_dict, module, image_shape = changed()
  renamed = {k.replace('fc.', 'linear.'): v for k, v in state_dict.items()}
  assert_same(weights.to_variables(renamed, module, image_shape),
              weights.to_variables(state_dict, module, image_shape))


class Depthwise(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Conv(6, (3, 2), feature_group_count=3, padding=0, name='conv')(x)


def test_depthwise_kernels():
  weight = np.random.default_rng(0).normal(size=(6, 1, 3, 2)).astype(np.float32)
  state_dict = {'conv.weight': weight, 'conv.bias': np.zeros(6, np.float32)}
  variables = weights.to_variables(state_dict, Depthwise(), (3, 2, 3))
  image = np.random.default_rng(1).normal(size=(1, 3, 2, 3)).astype(np.float32)
  out = Depthwise().apply(variables, image)[0, 0, 0]
  expected = [(weight[o, 0] * image[0, :, :, o // 2]).sum() for o in range(6)]
  np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_golden_teacher_survives_the_round_trip():
  arrays = golden('teacher_wrn16_1')
  variables = weights.to_variables(arrays, models.create('wrn16_1', 10), (32, 32, 3))
  again = weights.from_variables(variables)
  assert again.keys() == arrays.keys()
  for name in arrays.keys() - {k for k in arrays if k.endswith('tracked')}:
    np.testing.assert_array_equal(again[name], arrays[name])


@pytest.mark.parametrize(('number', 'share', 'within'), [
    (1_500, 0.934, 0.015),  # More than two standard deviations.
    pytest.param(10_000, 0.9339, 0.0002, marks=pytest.mark.exhaustive)])
def test_a_published_resnet56_scores_as_published(number, share, within):
  path = SHARED / 'teachers' / 'resnet56_cifar10.th'
  if not path.exists():
    pytest.skip('The published ResNet-56 is not at hand.')
  module = models.create('resnet56', 10, shortcut='pad')
  network = models.bind(
      module, weights.load(path, module, (32, 32, 3)), mean=(0.485, 0.456, 0.406),
      std=(0.229, 0.224, 0.225))
  classify = jax.jit(lambda network, x: network(x.astype(jnp.float32) / 255).logits.argmax(-1))
  images, labels = shared_loader().cifar10_test()
  batches = [slice(begin, begin + 500) for begin in range(0, number, 500)]
  correct = sum(int((classify(network, images[at]) == labels[at]).sum()) for at in batches)
  assert abs(correct / number - share) <= within


@pytest.mark.parametrize('other', ['layer1_0.conv1.weight', 'layer1.0_conv1.weight'])
def test_two_names_of_one_parameter_are_refused(other):
  state_dict, module, image_shape = changed()
  state_dict[other] = state_dict['layer1.0.conv1.weight'] + 1
  with pytest.raises(ValueError, match=rf'layer1\.0\.conv1\.weight and {other} are both'):
    weights.to_variables(state_dict, module, image_shape)


def test_two_last_layers_are_refused():
  """One is whole. Half of another must not replace it."""
  state_dict, module, image_shape = changed()
  weight, bias = state_dict['fc.weight'] + 1, state_dict.pop('fc.bias')
  state_dict |= {'linear.weight': weight, 'linear.bias': bias}
  with pytest.raises(ValueError, match=r'fc\.weight and linear\.weight are both fc\.weight'):
    weights.to_variables(state_dict, module, image_shape)


@pytest.mark.parametrize(('names', 'message'), [
    (('a/conv1/kernel', 'b/conv1/kernel'), r'a/conv1/kernel and b/conv1/kernel .* conv1\.weight'),
    (('probs/bias', 'fc1000/bias'), r'probs/bias and fc1000/bias are both fc\.bias'),
    (('_conv_stem.weight', 'conv_stem.weight'), r'are both conv_stem\.weight')])
def test_two_arrays_that_get_one_name_are_refused(names, message):
  with pytest.raises(ValueError, match=message):
    weights.translate_names({name: np.ones((3, 3, 2, 2)) for name in names})


CONVNET, IMAGE = models.create('convnet', 5, widths=(2, 3), strides=(1, 2)), (6, 4, 3)


def convnet_weights(num_classes=5, dtype=np.float32):
  """State dict of the module above with another number of classes."""
  draw = np.random.default_rng(0)
  bn = lambda name, size: {f'{name}.{leaf}': draw.random(size).astype(dtype)
                           for leaf in ('weight', 'bias', 'running_mean', 'running_var')}
  return {'conv1.weight': draw.normal(size=(2, 3, 3, 3)).astype(dtype), **bn('bn1', 2),
          'conv2.weight': draw.normal(size=(3, 2, 3, 3)).astype(dtype), **bn('bn2', 3),
          'fc.weight': draw.normal(size=(num_classes, 3)).astype(dtype),
          'fc.bias': draw.normal(size=num_classes).astype(dtype)}


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_is_widened(dtype, tmp_path):
  arrays = convnet_weights(dtype=jnp.dtype(dtype))
  (tmp_path / 'w').write_bytes(safetensors_numpy.save(arrays))
  loaded = weights.load(tmp_path / 'w', CONVNET, IMAGE)
  kernel = loaded['params']['fc']['kernel']
  assert kernel.dtype == loaded['batch_stats']['bn1']['var'].dtype == jnp.float32
  np.testing.assert_array_equal(kernel, arrays['fc.weight'].astype(np.float32).T)


def test_another_number_of_classes_is_said_plainly(tmp_path):
  (tmp_path / 'w').write_bytes(safetensors_numpy.save(convnet_weights(7)))
  with pytest.raises(ValueError, match=r'w does not fit: .* weights .* 7 classes, the network 5 '):
    weights.load(tmp_path / 'w', CONVNET, IMAGE)
  variables = weights.to_variables(convnet_weights(7), CONVNET.clone(num_classes=7), IMAGE)
  weights.save_safetensors(tmp_path / 'w', variables)
  with pytest.raises(ValueError, match=r'w does not fit: .* weights .* 7 classes, the network 5 '):
    weights.load(tmp_path / 'w', CONVNET, IMAGE)


@pytest.mark.parametrize('shape', [(5, 3, 3, 3), (2, 4, 3, 3), (2, 3)])
def test_other_shapes_say_nothing_of_classes(shape, tmp_path):
  changes = {'conv1.weight': np.zeros(shape, np.float32)}
  (tmp_path / 'w').write_bytes(safetensors_numpy.save(convnet_weights(7) | changes))
  with pytest.raises(ValueError, match=r'w does not fit: Parameter .* has the shape') as error:
    weights.load(tmp_path / 'w', CONVNET, IMAGE)
  assert 'classes' not in str(error.value)
