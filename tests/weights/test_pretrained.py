"""Published weights: every format, faithfully; hostile and damaged files, never."""

import contextlib
import functools
import importlib.util

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import SHARED, golden
from flax import linen as nn
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy
from torch_files import ARRAYS, Call, Name, Saver, dumps, saved

from dfkd_jax import models, weights


@pytest.fixture
def read_bytes(tmp_path):
  def read(data):
    (tmp_path / 'weights.tar').write_bytes(data)
    return weights.read(tmp_path / 'weights.tar')
  return read


@pytest.mark.parametrize('form', ['zip', 'legacy'])
@pytest.mark.parametrize('wrap', [
    lambda tree: tree,
    lambda tree: {'epoch': 3, 'best': 0.5, 'state_dict': tree, 'optimizer': {'state': [1, (2, 3)]}},
    lambda tree: {'net': {f'module.{k}': v for k, v in tree.items()}},
    lambda tree: {'model': {'model': {f'module._orig_mod.{k}': v for k, v in tree.items()}}, 'step': None}])
def test_reads_what_pytorch_saves(form, wrap, read_bytes):
  read = read_bytes(saved(form, wrap))
  assert list(read) == list(ARRAYS)
  for name, array in ARRAYS.items():
    assert read[name].dtype == array.dtype
    np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize('form', ['zip', 'legacy'])
def test_reads_views_by_their_offset_and_strides(form, read_bytes):
  base, saver = np.arange(60, dtype=np.float32), Saver()
  as_parameter = lambda tensor: Call(Name('torch._utils', '_rebuild_parameter'), (tensor, True, None))
  read = read_bytes(getattr(saver, form)({
      'transposed': saver.tensor(base, shape=(3, 4, 5), strides=(1, 3, 12)),
      'slice': saver.tensor(base, offset=7, shape=(2, 3), strides=(20, 6)),
      'expanded': saver.tensor(base, offset=5, shape=(4, 2), strides=(0, 1)),
      'empty': saver.tensor(base, shape=(0, 3), strides=(3, 1)),
      'old': saver.tensor(base, rebuild='_rebuild_tensor'),
      'parameter': as_parameter(saver.tensor(base, shape=(6, 10), strides=(10, 1)))}))
  np.testing.assert_array_equal(read['transposed'], base.reshape(5, 4, 3).transpose(2, 1, 0))
  np.testing.assert_array_equal(read['slice'], [[7, 13, 19], [27, 33, 39]])
  np.testing.assert_array_equal(read['expanded'], [[5, 6]] * 4)
  assert read['empty'].shape == (0, 3)
  np.testing.assert_array_equal(read['old'], base)
  np.testing.assert_array_equal(read['parameter'], base.reshape(6, 10))


@pytest.mark.parametrize('form', ['zip', 'legacy'])
@pytest.mark.parametrize('options', [
    {'offset': 58}, {'shape': (61,), 'strides': (1,)}, {'shape': (2, 2), 'strides': (59, 1)}, {'offset': -1},
    {'strides': (-1,)}, {'size': 61}, {'shape': (2**62,), 'strides': (2,)}, {'shape': (3, 3), 'strides': (1,)}])
def test_refuses_views_beyond_their_storage(form, options, read_bytes):
  saver = Saver()
  saver.tensor(np.zeros(1000, np.float32))  # What lies beside must not be read.
  tensor = saver.tensor(np.zeros(60, np.float32), **{'shape': (3,), 'strides': (1,)} | options)
  with pytest.raises(ValueError, match=r'Could not read .*truncated or damaged'):
    read_bytes(getattr(saver, form)({'a': tensor}))


@pytest.mark.parametrize('form', ['zip', 'legacy'])
@pytest.mark.parametrize('shape', [(2**40,), (4, 2**30), (61,)])
def test_refuses_tensors_that_repeat_their_storage(form, shape, read_bytes):
  saver = Saver()
  tensor = saver.tensor(np.zeros(60, np.float32), shape=shape, strides=(0,) * len(shape))
  with pytest.raises(ValueError, match=r'Refused to read .*repeats the 60 numbers of a storage as a tensor'):
    read_bytes(getattr(saver, form)({'a': tensor}))


def test_reads_what_this_pytorch_saves(tmp_path):
  torch = pytest.importorskip('torch')
  weight = torch.randn(4, 3, 5, 2)
  tree = {'a': weight.transpose(0, 2), 'b': weight.bfloat16()[1:], 'c': torch.nn.Parameter(weight.half())}
  for new in (True, False):
    torch.save({'state_dict': tree, 'size': weight.size()}, tmp_path / 'w', _use_new_zipfile_serialization=new)
    read = weights.read(tmp_path / 'w')
    for name, tensor in tree.items():
      np.testing.assert_array_equal(read[name].astype(np.float32), tensor.detach().float().numpy())


@pytest.mark.parametrize('form', ['zip', 'legacy', 'bare'])
@pytest.mark.parametrize('name', [
    Name('os', 'system'), Name('posix', 'system'), Name('builtins', 'eval'), Name('builtins', 'exec'),
    Name('torch', 'load'), Name('torch._utils', 'os.system'), Name('numpy', 'load'), Name('collections', 'deque')])
def test_refuses_by_name_what_a_pickle_would_call(form, name, tmp_path):
  touched = tmp_path / 'touched'
  call = Call(name, (f'touch {touched}' if 'system' in name.name else f'open({str(touched)!r}, "w")',))
  data = dumps(call) if form == 'bare' else saved(form, lambda tree: {'state_dict': tree, 'x': [call]})
  (tmp_path / 'w.pt').write_bytes(data)
  with pytest.raises(ValueError, match=rf'Refused to read .*w\.pt: it names {name.module}\.{name.name}, '):
    weights.read(tmp_path / 'w.pt')
  assert not touched.exists()


@hypothesis.settings(deadline=None, derandomize=True, suppress_health_check=['function_scoped_fixture'])
@hypothesis.given(
    module=st.sampled_from(['torch', 'torch._utils', 'os', 'builtins', 'collections', 'dfkd_jax.models']),
    name=st.from_regex(r'[a-zA-Z_]{1,12}(\.[a-z_]{1,9})?', fullmatch=True), form=st.sampled_from(['zip', 'legacy']))
def test_refuses_all_names_but_those_of_tensors(module, name, form, read_bytes):
  hypothesis.assume(not name.endswith('Storage') and (module, name) not in {
      ('builtins', 'set'), ('torch', 'Size'), ('torch', 'bool')})
  with pytest.raises(ValueError, match='Refused to read') as error:
    read_bytes(saved(form, lambda tree: {'state_dict': tree, 'x': Name(module, name)}))
  assert f'{module}.{name}' in str(error.value)


@pytest.mark.parametrize('payload', [
    Call(Name('torch._utils', '_rebuild_tensor_v2'), ('text', 0, (1,), (1,), False, None)),
    Call(Name('torch._utils', '_rebuild_parameter'), ((1, 2), False, None)),
    Call(Name('torch', 'FloatStorage'), (3,)), 5, [1], {}, {'state_dict': {}}, {1: 2}])
def test_refuses_what_is_no_set_of_weights(payload, read_bytes):
  for form in ('zip', 'legacy'):
    with pytest.raises(ValueError, match=r'weights\.tar'):
      read_bytes(getattr(Saver(), form)(payload))


def test_nested_and_circular_containers_end(read_bytes):
  bomb = {}
  for _ in range(60):
    bomb = {'a': bomb, 'b': bomb}
  assert list(read_bytes(saved('zip', lambda tree: {'net': tree, 'bomb': bomb}))) == list(ARRAYS)
  circle = {}
  circle['net'] = circle
  with pytest.raises(ValueError, match='truncated or damaged'):
    read_bytes(Saver().zip(circle))


def safe_bytes():
  return safetensors_numpy.save({k: v for k, v in ARRAYS.items() if k != 'brain'})


@functools.cache
def whole(form):
  return safe_bytes() if form == 'safetensors' else saved(form, lambda tree: {'state_dict': tree, 'epoch': 3})


@hypothesis.settings(deadline=None, derandomize=True, suppress_health_check=['function_scoped_fixture'])
@hypothesis.given(form=st.sampled_from(['zip', 'legacy', 'safetensors']), share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_give_one_clear_error(form, share, read_bytes):
  data = whole(form)
  with pytest.raises(ValueError, match=r'^(Could not|Refused to) read [^\n]*weights\.tar: it is [^\n]*$'):
    read_bytes(data[:int(share * len(data))])


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True,
                     suppress_health_check=['function_scoped_fixture'])
@hypothesis.given(form=st.sampled_from(['zip', 'legacy', 'safetensors']), where=st.floats(0, 1, exclude_max=True),
                  what=st.binary(min_size=1, max_size=4))
def test_damaged_files_give_arrays_or_a_value_error(form, where, what, read_bytes):
  data = bytearray(whole(form))
  where = int(where * len(data))
  data[where:where + len(what)] = what
  with contextlib.suppress(ValueError):
    read = read_bytes(bytes(data))
    assert all(isinstance(array, np.ndarray) for array in read.values())


@hypothesis.settings(deadline=None, derandomize=True, suppress_health_check=['function_scoped_fixture'])
@hypothesis.given(data=st.binary(max_size=40))
def test_other_files_are_refused(data, read_bytes):
  with pytest.raises(ValueError, match=r'(Could not|Refused to) read .*weights\.tar'):
    read_bytes(data)


def test_bfloat16_safetensors(tmp_path):
  data = np.array([1.5, -2.0], ml_dtypes.bfloat16)
  header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
  (tmp_path / 'w').write_bytes(np.uint64(len(header)).tobytes() + header + data.tobytes())
  read = weights.read(tmp_path / 'w')['a']
  assert read.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(read, data)


def random_variables(module, image_shape):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
  return jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 2, s.shape), jnp.float32), shapes)


MODULES = [
    (models.create('wrn16_2', 7), (8, 12, 3)), (models.create('resnet8', 5, shortcut='pad'), (8, 8, 2)),
    (models.VGG(3, groups=((4, 5), (6,))), (8, 8, 1)), (models.ResNet(4, (1, 2), bottleneck=True, width=8), (8, 8, 3)),
    (models.Generator((8, 12, 1), width=5), (7,)), (models.SpatialGenerator((3, 4, 5)), (2, 3, 6)),
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
  np.testing.assert_allclose(logits, state_dict['fc.weight'] @ features + state_dict['fc.bias'], rtol=1e-5)


def changed(**changes):
  module, image_shape = MODULES[1]
  state_dict = weights.from_variables(random_variables(module, image_shape)) | changes
  return {k: v for k, v in state_dict.items() if v is not None}, module, image_shape


@pytest.mark.parametrize(('changes', 'message'), [
    ({'fc.weight': np.zeros((6, 64))}, r'fc\.weight has the shape \(64, 6\) where \(64, 5\) is wanted'),
    ({'layer1.0.bn1.running_mean': None}, r'Missing parameter batch_stats/layer1_0/bn1/mean \(16,\)'),
    ({'layer1.7.conv1.weight': np.zeros((1, 2, 3, 3))},
     r'Unexpected parameter layer1\.7\.conv1\.weight \(1, 2, 3, 3\): ThinResNet has none'),
    ({'fc.bias': np.array([0, np.nan, 0, np.inf, 0])}, r'fc\.bias holds 2 values that are not finite in float32'),
    ({'fc.bias': np.array([0, 0, 1e300, 0, 0])}, r'fc\.bias holds 1 values that are not finite in float32'),
    ({'conv1.weight': np.zeros((16, 2, 3, 3), np.int8)}, r'conv1\.weight is int8, not floating-point')])
def test_weights_that_do_not_fit_are_refused(changes, message, tmp_path):
  state_dict, module, image_shape = changed(**changes)
  with pytest.raises(ValueError, match=message):
    weights.to_variables(state_dict, module, image_shape)
  (tmp_path / 'w').write_bytes(safetensors_numpy.save(state_dict))
  with pytest.raises(ValueError, match=message):
    weights.load(tmp_path / 'w', module, image_shape)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda v: v['params'].pop('fc'), r'Missing parameter params\.fc\.bias \(5,\)'),
    (lambda v: v['params'].update(head={'bias': jnp.zeros(3)}), r'Unexpected parameter params\.head\.bias \(3,\)'),
    (lambda v: v['params']['fc'].update(bias=jnp.zeros(3)), r'params\.fc\.bias has the shape \(3,\) where \(5,\)')])
def test_own_files_that_do_not_fit_are_refused(change, message, tmp_path):
  module, image_shape = MODULES[1]
  variables = random_variables(module, image_shape)
  change(variables)
  weights.save_safetensors(tmp_path / 'w', variables)
  with pytest.raises(ValueError, match=message):
    weights.load(tmp_path / 'w', module, image_shape)


def test_saving_refuses_values_beyond_half_precision(tmp_path):
  variables = {'params': {'fc': {'kernel': jnp.full((2, 3), 1e6)}}}
  with pytest.raises(ValueError, match=r'params\.fc\.kernel holds values that are not finite in float16'):
    weights.save_safetensors(tmp_path / 'w', variables, dtype='float16')
  assert not (tmp_path / 'w').exists()


def test_metadata_of_another_file_is_refused(tmp_path):
  (tmp_path / 'w').write_bytes(saved('zip'))
  with pytest.raises(ValueError, match='it is no safetensors file'):
    weights.read_metadata(tmp_path / 'w')


def test_the_last_layer_may_be_called_otherwise():
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
  np.testing.assert_allclose(out, [(weight[o, 0] * image[0, :, :, o // 2]).sum() for o in range(6)], rtol=1e-5)


def test_golden_teacher_survives_the_round_trip():
  arrays = golden('teacher_wrn16_1')
  variables = weights.to_variables(arrays, models.create('wrn16_1', 10), (32, 32, 3))
  again = weights.from_variables(variables)
  assert again.keys() == arrays.keys()
  for name in arrays.keys() - {k for k in arrays if k.endswith('tracked')}:
    np.testing.assert_array_equal(again[name], arrays[name])


def test_a_published_resnet56_scores_as_published():
  path, loader = SHARED / 'teachers' / 'resnet56_cifar10.th', SHARED / 'data' / 'load.py'
  if not (path.exists() and loader.exists()):
    pytest.skip('The published ResNet-56, or the CIFAR-10 test set, is not at hand.')
  spec = importlib.util.spec_from_file_location('load', loader)
  load = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(load)
  module = models.create('resnet56', 10, shortcut='pad')
  network = models.bind(
      module, weights.load(path, module, (32, 32, 3)), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
  classify = jax.jit(lambda network, images: network(images.astype(jnp.float32) / 255).logits.argmax(-1))
  images, labels = load.cifar10_test()
  correct = sum(int((classify(network, images[i:i + 500]) == labels[i:i + 500]).sum()) for i in range(0, 10_000, 500))
  assert abs(correct - 9339) <= 2


@pytest.mark.parametrize('other', ['layer1_0.conv1.weight', 'layer1.0_conv1.weight'])
def test_two_names_of_one_parameter_are_refused(other):
  state_dict, module, image_shape = changed()
  state_dict[other] = state_dict['layer1.0.conv1.weight'] + 1
  with pytest.raises(ValueError, match=rf'Parameters layer1\.0\.conv1\.weight and {other} are the same one'):
    weights.to_variables(state_dict, module, image_shape)


def test_two_last_layers_are_refused():
  """All of one and half of another, which would take its place."""
  state_dict, module, image_shape = changed()
  state_dict |= {'linear.weight': state_dict['fc.weight'] + 1, 'linear.bias': state_dict.pop('fc.bias')}
  with pytest.raises(ValueError, match=r'Parameters fc\.weight and linear\.weight are the same one, fc\.weight'):
    weights.to_variables(state_dict, module, image_shape)


@pytest.mark.parametrize('arrays', [
    {'_blocks.007._bn0.weight': np.ones(3)}, {'_blocks.0._project_conv.weight': np.array(1.0)},
    {f'_blocks.{"9" * 5000}._bn0.weight': np.ones(3)}, {'_blocks.²._bn0.weight': np.ones(3)}],
    ids=['zeros', 'scalar', 'digits', 'power'])
def test_odd_names_of_blocks_do_not_fit(arrays, tmp_path):
  module, image_shape = MODULES[1]
  (tmp_path / 'w').write_bytes(safetensors_numpy.save({'_conv_stem.weight': np.ones((4, 3, 3, 3))} | arrays))
  with pytest.raises(ValueError, match=r'^[^\n]*w does not fit: Unexpected parameter ') as error:
    weights.load(tmp_path / 'w', module, image_shape)
  assert len(str(error.value)) < 400


def test_what_nobody_thought_of_does_not_fit(tmp_path, monkeypatch):
  monkeypatch.setattr(weights, 'translate', lambda arrays: {}['a\nb'])
  (tmp_path / 'w').write_bytes(safetensors_numpy.save({'a': np.ones(3)}))
  with pytest.raises(ValueError, match=r"^[^\n]*w does not fit: its names and shapes cannot be converted \(KeyError "):
    weights.load(tmp_path / 'w', *MODULES[1])
