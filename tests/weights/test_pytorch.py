"""Files of PyTorch and safetensors: read faithfully; damaged files and foreign names refused."""

import contextlib
import functools

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy
from torch_files import ARRAYS, Call, Name, Saver, dumps, saved

from dfkd_jax import weights

SETTINGS = hypothesis.settings(
    deadline=None, derandomize=True, suppress_health_check=['function_scoped_fixture'])


@pytest.fixture
def read_bytes(tmp_path):
  def read(data):
    (tmp_path / 'weights.tar').write_bytes(data)
    return weights.read(tmp_path / 'weights.tar')
  return read


@pytest.mark.parametrize('form', ['zip', 'legacy'])
@pytest.mark.parametrize('wrap', [
    lambda tree: tree,
    lambda tree: {
        'epoch': 3, 'best': 0.5, 'state_dict': tree, 'optimizer': {'state': [1, (2, 3)]}},
    lambda tree: {'net': {f'module.{k}': v for k, v in tree.items()}},
    lambda tree: {
        'model': {'model': {f'module._orig_mod.{k}': v for k, v in tree.items()}}, 'step': None}])
def test_reads_what_pytorch_saves(form, wrap, read_bytes):
  read = read_bytes(saved(form, wrap))
  assert list(read) == list(ARRAYS)
  for name, array in ARRAYS.items():
    assert read[name].dtype == array.dtype
    np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize('form', ['zip', 'legacy'])
def test_reads_views_by_their_offset_and_strides(form, read_bytes):
  base, saver = np.arange(60, dtype=np.float32), Saver()
  as_parameter = lambda tensor: Call(
      Name('torch._utils', '_rebuild_parameter'), (tensor, True, None))
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
    {'offset': 58}, {'shape': (61,), 'strides': (1,)}, {'shape': (2, 2), 'strides': (59, 1)},
    {'offset': -1}, {'strides': (-1,)}, {'shape': (3, 3), 'strides': (1,)}])
def test_refuses_views_beyond_their_storage(form, options, read_bytes):
  saver = Saver()
  saver.tensor(np.zeros(1000, np.float32))  # Must not be read.
  tensor = saver.tensor(np.zeros(60, np.float32), **{'shape': (3,), 'strides': (1,)} | options)
  with pytest.raises(ValueError, match=r'Could not read .*truncated or damaged'):
    read_bytes(getattr(saver, form)({'a': tensor}))


@pytest.mark.parametrize('form', ['zip', 'legacy'])
def test_refuses_big_endian_numbers(form, read_bytes):
  saver = Saver(byteorder='big')
  with pytest.raises(ValueError, match=r'\A[^\n]*is big-endian, which is not supported'):
    read_bytes(getattr(saver, form)({'a': saver.tensor(np.ones(3, np.float32))}))


@pytest.mark.parametrize('size', [59, 61])
def test_storages_have_the_announced_size(size, read_bytes):
  saver = Saver()
  tensor = saver.tensor(np.zeros(60, np.float32), shape=(3,), strides=(1,), size=size)
  with pytest.raises(ValueError, match='truncated or damaged'):
    read_bytes(saver.zip({'a': tensor}))


@pytest.mark.parametrize('form', ['zip', 'legacy'])
@pytest.mark.parametrize('shape', [(2**40,), (4, 2**30), (61,)])
def test_refuses_tensors_that_repeat_their_storage(form, shape, read_bytes):
  saver = Saver()
  tensor = saver.tensor(np.zeros(60, np.float32), shape=shape, strides=(0,) * len(shape))
  with pytest.raises(ValueError, match=r'Refused to read .*repeats the 60 numbers of a storage'):
    read_bytes(getattr(saver, form)({'a': tensor}))


def test_reads_what_this_pytorch_saves(tmp_path):
  torch = pytest.importorskip('torch')
  weight = torch.randn(4, 3, 5, 2)
  tree = {'a': weight.transpose(0, 2), 'b': weight.bfloat16()[1:],
          'c': torch.nn.Parameter(weight.half())}
  for new in (True, False):
    torch.save({'state_dict': tree, 'size': weight.size()}, tmp_path / 'w',
               _use_new_zipfile_serialization=new)
    read = weights.read(tmp_path / 'w')
    for name, tensor in tree.items():
      np.testing.assert_array_equal(read[name].astype(np.float32), tensor.detach().float().numpy())


@pytest.mark.parametrize('form', ['zip', 'legacy', 'bare'])
@pytest.mark.parametrize('name', [
    Name('os', 'system'), Name('posix', 'system'), Name('builtins', 'eval'),
    Name('builtins', 'exec'), Name('torch', 'load'), Name('torch._utils', 'os.system'),
    Name('numpy', 'load'), Name('collections', 'deque')])
def test_refuses_by_name_each_call_of_a_pickle(form, name, tmp_path):
  touched = tmp_path / 'touched'
  command = f'touch {touched}' if 'system' in name.name else f'open({str(touched)!r}, "w")'
  call = Call(name, (command,))
  wrap = lambda tree: {'state_dict': tree, 'x': [call]}
  data = dumps(call) if form == 'bare' else saved(form, wrap)
  (tmp_path / 'w.pt').write_bytes(data)
  message = rf'Refused to read .*w\.pt: it names {name.module}\.{name.name}, '
  with pytest.raises(ValueError, match=message):
    weights.read(tmp_path / 'w.pt')
  assert not touched.exists()


@SETTINGS
@hypothesis.given(
    module=st.sampled_from(['torch', 'torch._utils', 'os', 'builtins', 'collections', 'dfkd_jax']),
    name=st.from_regex(r'[a-zA-Z_]{1,12}(\.[a-z_]{1,9})?', fullmatch=True),
    form=st.sampled_from(['zip', 'legacy']))
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
def test_refuses_other_content(payload, read_bytes):
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
  with pytest.raises(ValueError, match='holds no arrays by name'):
    read_bytes(Saver().zip(circle))


def safe_bytes():
  return safetensors_numpy.save({k: v for k, v in ARRAYS.items() if k != 'brain'})


@functools.cache
def whole_file(form):
  if form == 'safetensors':
    return safe_bytes()
  return saved(form, lambda tree: {'state_dict': tree, 'epoch': 3})


@SETTINGS
@hypothesis.given(
    form=st.sampled_from(['zip', 'legacy', 'safetensors']), share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_give_one_clear_error(form, share, read_bytes):
  data = whole_file(form)
  with pytest.raises(ValueError, match=r'^(Could not|Refused to) read [^\n]*\.tar: it [^\n]*$'):
    read_bytes(data[:int(share * len(data))])


@hypothesis.settings(SETTINGS, max_examples=300)
@hypothesis.given(
    form=st.sampled_from(['zip', 'legacy', 'safetensors']), where=st.floats(0, 1, exclude_max=True),
    what=st.binary(min_size=1, max_size=4))
def test_damaged_files_give_arrays_or_a_value_error(form, where, what, read_bytes):
  data = bytearray(whole_file(form))
  where = int(where * len(data))
  data[where:where + len(what)] = what
  with contextlib.suppress(ValueError):
    read = read_bytes(bytes(data))
    assert all(isinstance(array, np.ndarray) for array in read.values())


@SETTINGS
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
