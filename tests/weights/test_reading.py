"""The format of a file or folder, and the entry of a checkpoint that is read."""

import io
import re
import shutil
import zipfile

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import numpy as safetensors_numpy
from torch_files import Saver

from dfkd_jax import weights
from dfkd_jax.runs.checkpoint import Checkpoints

ARRAYS = {'conv1.weight': np.arange(24, dtype=np.float32).reshape(2, 3, 4),
          'bn1.running_mean': np.arange(2.0)}


def npz(**arrays):
  stream = io.BytesIO()
  np.savez(stream, **arrays)
  return stream.getvalue()


@pytest.fixture
def read_bytes(tmp_path):
  def read(data, entry=None):
    (tmp_path / 'weights').write_bytes(data)
    return weights.read(tmp_path / 'weights', entry)
  return read


def assert_arrays(read, expected):
  assert read.keys() == expected.keys()
  for name, array in expected.items():
    assert read[name].dtype == array.dtype
    np.testing.assert_array_equal(read[name], array)


def test_numpy_archives(read_bytes):
  arrays = ARRAYS | {'layer/b': np.float16([1, 2, 3]), 'scalar': np.array(3),
                     'f': np.asfortranarray(np.eye(2, 3))}
  assert_arrays(read_bytes(npz(**arrays)), arrays)
  stream = io.BytesIO()
  np.savez_compressed(stream, **arrays)
  assert_arrays(read_bytes(stream.getvalue()), arrays)


@pytest.mark.parametrize(('array', 'dtype'), [
    (np.array([print, 1], dtype=object), 'object'), (np.array(['a', 'bc']), '<U2'),
    (np.zeros(2, 'V2'), r'\|V2')])
def test_numpy_archives_hold_numbers_alone(array, dtype, read_bytes):
  with pytest.raises(ValueError, match=rf'Refused to read .*: it holds x of dtype {dtype}, not'):
    read_bytes(npz(a=np.ones(3), x=array))


@pytest.mark.parametrize('share', np.arange(10) / 10)
def test_truncated_archives_give_one_clear_error(share, read_bytes):
  data = npz(**ARRAYS)
  with pytest.raises(ValueError, match=r'^(Could not|Refused to) read [^\n]*weights: it [^\n]*$'):
    read_bytes(data[:int(share * len(data))])


@pytest.mark.parametrize('shape', [(2**50,), (5,), (-1,), (2**70,)])
def test_numpy_arrays_that_announce_more_than_they_hold_give_one_clear_error(shape, read_bytes):
  stream, header = io.BytesIO(), io.BytesIO()
  np.lib.format.write_array_header_1_0(
      header, {'descr': '<f4', 'fortran_order': False, 'shape': shape})
  with zipfile.ZipFile(stream, 'w') as archive:
    archive.writestr('a.npy', header.getvalue() + bytes(16))
  size = len(header.getvalue()) + 16
  with pytest.raises(ValueError, match=rf'Refused .*: it has {size} bytes of a, .* -?\d+\.$'):
    read_bytes(stream.getvalue())


@pytest.mark.parametrize(('data', 'message'), [
    (b'\x1f\x8b\x08' + bytes(9), 'is compressed by gzip; unpack it'),
    (b'GGUF' + bytes(9), 'is GGUF'), (b'\x1c\0\0\0TFL3' + bytes(9), 'is TensorFlow Lite'),
    (b'\x93NUMPY\1\0' + bytes(9), 'is one array of NumPy'),
    (b'x' * 257 + b'ustar' + bytes(9), 'is a tar archive'),
    (b'\x08\x07\x12\x07pytorch', 'is none of safetensors')])
def test_other_formats_are_refused_by_name(data, message, read_bytes):
  with pytest.raises(ValueError, match=rf'^Refused to read [^\n]*weights: it {message}[^\n]*$'):
    read_bytes(data)


def checkpoint(tree):
  """A file of PyTorch. Each number in the tree becomes a state dict with a 'w' of this number."""
  saver = Saver()

  def grow(node):
    if isinstance(node, dict):
      return {key: grow(value) for key, value in node.items()}
    if isinstance(node, int):
      return {'w': saver.tensor(np.full(3, node, np.float32))}
    return node

  return saver.zip(grow(tree))


@pytest.mark.parametrize(('tree', 'entry', 'number'), [
    ({'state_dict': 1, 'state_dict_ema': 2}, None, 1),
    ({'state_dict': 1, 'state_dict_ema': 2}, 'ema', 2),
    ({'ema': 2, 'weights': 1, 'epoch': 'x'}, None, 1),
    ({'model_ema': {'model': 2}, 'optimizer': {}}, None, 2),
    ({'model': 1, 'ema': {'state_dict': 2}}, 'ema', 2),
    ({'model': {'ema': 2, 'net': 1}}, None, 1), ({'model': {'ema': 2, 'net': 1}}, 'model.ema', 2),
    ({'teacher': 3, 'model': 1}, 'teacher', 3), ({'ema': 2, 'model_ema': 4}, 'model_ema', 4)])
def test_plain_weights_come_before_averages(tree, entry, number, tmp_path, read_bytes):
  expected = {'w': np.full(3, number, np.float32)}
  assert_arrays(read_bytes(checkpoint(tree), entry), expected)
  if entry:
    assert_arrays(weights.read(f'{tmp_path / "weights"}#{entry}'), expected)


@pytest.mark.parametrize(('tree', 'entry', 'message'), [
    ({'state_dict': 1, 'optimizer': {}}, 'ema',
     r"holds no entry 'ema', but \['optimizer', 'state_dict'\]"),
    ({'state_dict': 1}, 'state_dict.w', "holds no entry 'w', but arrays alone"),
    ({'a': {'b': 1}}, None, r"holds no arrays by name, but \['a'\]")])
def test_entries_that_are_not_there_are_refused(tree, entry, message, read_bytes):
  with pytest.raises(ValueError, match=f'Refused to read .*: it {message}'):
    read_bytes(checkpoint(tree), entry)


def test_a_file_may_have_a_number_sign_in_its_name(tmp_path):
  (tmp_path / 'run#3').write_bytes(npz(**ARRAYS))
  assert_arrays(weights.read(tmp_path / 'run#3'), ARRAYS)
  with pytest.raises(FileNotFoundError):
    weights.read(tmp_path / 'gone#ema')


@pytest.mark.parametrize(('names', 'expected'), [
    (['model.a', 'model.b.c'], ['a', 'b.c']),
    (['module.model._orig_mod.a', 'module.model._orig_mod.b'], ['a', 'b']),
    (['model.a', 'head.b'], ['model.a', 'head.b']),
    (['backbone.a', 'backbone.b'], ['backbone.a', 'backbone.b']),
    (['n_averaged', 'module.a'], ['a']), (['modela', 'modelb'], ['modela', 'modelb'])])
def test_prefixes_go_if_all_names_have_them(names, expected, read_bytes):
  data = safetensors_numpy.save({name: np.ones(3, np.float32) for name in names})
  assert sorted(read_bytes(data)) == sorted(expected)


VARIABLES = {
    'params': {'conv1': {'kernel': np.arange(12, dtype=np.float32).reshape(3, 4)},
               'fc': [{'bias': np.ones(2, 'f2')}]},
    'batch_stats': {'bn1': {'mean': np.arange(3, dtype=np.float32)}}}
FLAT = {'params.conv1.kernel': VARIABLES['params']['conv1']['kernel'],
        'params.fc.0.bias': np.ones(2, 'f2'),
        'batch_stats.bn1.mean': VARIABLES['batch_stats']['bn1']['mean']}
SGD = {'trace': {'params': np.ones(3, np.float32)}}


def save(path, tree):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree)
  return path


@pytest.mark.parametrize('tree', [
    VARIABLES, VARIABLES | {'opt_state': SGD, 'step': np.array(3)},
    {'model': VARIABLES, 'ema': SGD}, {'params': VARIABLES}])
def test_folders_of_orbax(tree, tmp_path):
  assert_arrays(weights.read(save(tmp_path / 'weights', tree)), FLAT)


def test_steps_of_orbax_and_entries(tmp_path):
  other = VARIABLES | {'params': {'conv1': {'kernel': np.zeros((3, 4), np.float32)}}}
  with ocp.CheckpointManager(tmp_path / 'steps') as manager:
    for step, tree in ((9, other), (10, {'model': VARIABLES, 'ema': other})):
      manager.save(step, args=ocp.args.StandardSave(tree))
  assert_arrays(weights.read(tmp_path / 'steps'), FLAT)
  assert not weights.read(f'{tmp_path / "steps"}#ema')['params.conv1.kernel'].any()
  assert not weights.read(tmp_path / 'steps' / '9')['params.conv1.kernel'].any()
  with pytest.raises(ValueError, match=r"^Refused to [^\n]* no params in 'old' among \['ema/batch"):
    weights.read(tmp_path / 'steps', 'old')


def test_subtrees_of_orbax(tmp_path):
  tree = weights.find_checkpoint(save(tmp_path / 'weights', {'model': VARIABLES}))
  bias = {'fc/0/bias': FLAT['params.fc.0.bias']}
  kernel = {'conv1/kernel': FLAT['params.conv1.kernel']}
  assert_arrays(weights.read_subtree(tree, 'model/params'), bias | kernel)
  assert_arrays(weights.read_subtree(tree, 'model/params', lambda path: 'fc' in path), bias)
  assert len(weights.read_subtree(tree, '')) == 3
  with pytest.raises(ValueError, match="holds nothing under 'model/param'"):
    weights.read_subtree(tree, 'model/param')


@pytest.mark.parametrize('wrap', [
    lambda network: {'student': {'network': network, 'step': np.ones(1)}},
    lambda network: {'network': network, 'opt_state': SGD}])
def test_own_checkpoints_give_the_latest_student(wrap, tmp_path, caplog):
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    for step in (1, 2):
      network = {'params': {'fc': {'bias': jnp.full(3, step)}},
                 'batch_stats': {'bn': {'mean': jnp.full(5, step)}}}
      checkpoints.save(step, wrap(network) | {'synthesis': [np.zeros(7)]}, {})
  assert_arrays(weights.read(tmp_path / 'checkpoints'), {
      'params.fc.bias': np.full(3, 2, np.int32), 'batch_stats.bn.mean': np.full(5, 2, np.int32)})
  assert not caplog.records


def test_truncated_folders_of_orbax_give_one_clear_error(tmp_path):
  save(tmp_path / 'whole', VARIABLES)
  files = [path.relative_to(tmp_path / 'whole') for path in (tmp_path / 'whole').rglob('*')
           if path.parent.name == 'd' or path.name in ('_METADATA', 'manifest.ocdbt')]
  assert len(files) >= 4
  failed = 0
  for name in files:
    for share in np.arange(10) / 10:
      folder = shutil.copytree(tmp_path / 'whole', tmp_path / f'{failed}_{share}')
      data = (folder / name).read_bytes()
      (folder / name).write_bytes(data[:int(share * len(data))])
      message = None
      try:
        assert_arrays(weights.read(folder), FLAT)  # Some files are not needed.
      except ValueError as error:
        message = str(error)
        failed += 1
      pattern = rf'(Could not|Refused to) read {folder}: it [^\n]*'
      assert message is None or re.fullmatch(pattern, message)
      shutil.rmtree(folder)
  assert failed >= 30


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_folders_of_the_hub(name, tmp_path):
  (tmp_path / name).write_bytes(safetensors_numpy.save(ARRAYS))
  assert_arrays(weights.read(tmp_path), ARRAYS)


def test_other_folders_are_refused(tmp_path):
  (tmp_path / 'saved_model.pb').write_bytes(b'x')
  with pytest.raises(ValueError, match=r"^Refused to [^\n]* folder [^\n]*\['saved_model.pb'\]\.$"):
    weights.read(tmp_path)
