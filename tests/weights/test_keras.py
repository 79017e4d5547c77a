"""Weights that Keras saved: the layers' names, only arrays, and one line for other content."""

import contextlib
import io
import sys
import zipfile

import h5py
import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from keras_files import h5

from dfkd_jax import weights
from dfkd_jax.weights.formats import archives

DRAW = np.random.default_rng(0)
ARRAYS = {
    'conv1/kernel': DRAW.normal(size=(3, 2, 4, 5)).astype(np.float32),
    'conv1/bias': np.arange(5, dtype=np.float32),
    **{f'bn_conv1/{name}': DRAW.random(5).astype(np.float32)
       for name in ('gamma', 'beta', 'moving_mean', 'moving_variance')},
    'block/dense/kernel': np.linspace(-1, 1, 35).reshape(5, 7).astype(np.float16)}


def keras2(prefix=''):
  """Nested as in Keras 2: a group for the layer, and within it the weight's own name."""
  path = lambda name: name if name.startswith('block/') else f'{name.split("/")[0]}/{name}'
  return {f'{prefix}{path(name)}:0': array for name, array in ARRAYS.items()}


NUMBERED = {
    'layers/conv2d_3/vars/0': ARRAYS['conv1/kernel'],
    'layers/conv2d_3/vars/1': ARRAYS['conv1/bias'],
    **{f'layers/batch_normalization/vars/{index}': array
       for index, array in enumerate(list(ARRAYS.values())[2:6])},
    'layers/sequential/layers/dense_1/vars/0': ARRAYS['block/dense/kernel'],
    'optimizer/vars/0': np.zeros(3, np.int64)}
LABELS = {
    'layers/conv2d_3': 'conv1', 'layers/batch_normalization': 'bn_conv1',
    'layers/sequential': 'block', 'layers/sequential/layers/dense_1': 'dense'}


def label(file):
  for path, name in LABELS.items():
    file.require_group(f'{path}/vars').attrs['name'] = name


def keras3():
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w') as archive:
    archive.writestr('metadata.json', '{}')
    archive.writestr('config.json', '{"class_name": "Functional"}')
    archive.writestr('model.weights.h5', h5(NUMBERED, label))
  return stream.getvalue()


@pytest.fixture
def read_bytes(tmp_path):
  def read(data):
    (tmp_path / 'weights').write_bytes(data)
    return weights.read(tmp_path / 'weights')
  return read


@pytest.mark.parametrize('data', [
    h5(keras2()), h5(keras2('model_weights/') | {'optimizer_weights/adam/m:0': np.zeros(2)}),
    h5(NUMBERED, label), keras3(), h5(ARRAYS)],
    ids=['weights', 'model', 'keras3_weights', 'keras3_model', 'keras3_h5'])
def test_arrays_are_named_by_layer_and_weight(data, read_bytes):
  read = read_bytes(data)
  assert read.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    assert read[name].dtype == array.dtype
    np.testing.assert_array_equal(read[name], array)
    assert not read[name].flags.writeable


def test_brain_floats_as_keras_stores_them(read_bytes):
  array = np.linspace(-3, 3, 7).astype(ml_dtypes.bfloat16)

  def store(file):
    file.create_dataset('dense/kernel', data=array).attrs['dtype'] = 'bfloat16'

  read = read_bytes(h5({}, store))['dense/kernel']
  assert read.dtype == array.dtype
  np.testing.assert_array_equal(read, array)


def test_layers_without_a_stored_name_keep_that_of_their_class(read_bytes):
  assert list(read_bytes(h5({'layers/dense_2/vars/0': np.ones((2, 3))}))) == ['dense_2/kernel']


@pytest.mark.parametrize('path', [
    'layers/batch_normalization_1/vars/{}', 'layers/lstm/cell/vars/{}',
    '_layer_checkpoint_dependencies/dense/vars/{}'])
def test_numbers_without_names_are_refused(path, read_bytes):
  data = h5({path.format(index): np.ones(4) for index in range(3)})
  with pytest.raises(ValueError, match=r'Refused to .*numbers the 3 variables of .*as \.h5\.$'):
    read_bytes(data)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda file: file.create_dataset('names', data=[b'abc', b'd']),
     'holds names of dtype object'),
    (lambda file: file.create_dataset('opaque', data=np.zeros(3, 'V2')),
     r'holds opaque of dtype \|V2'),
    (lambda file: file.create_dataset('bn_conv1/bn_conv1/gamma', data=np.ones(5)),
     'holds two arrays called bn_conv1/gamma'),
    (lambda file: file.create_dataset('bomb', (2**36,), 'f4', chunks=(1024,)),
     r'announces 2748779\d* bytes of arrays')])
def test_other_content_is_refused(change, message, read_bytes):
  with pytest.raises(ValueError, match=rf'Refused to read .*weights: it {message}'):
    read_bytes(h5(ARRAYS, change))


def test_other_files_are_never_opened(tmp_path, read_bytes):
  secret = tmp_path / 'secret.h5'
  secret.write_bytes(h5({'kernel': np.full(3, 7.0)}))
  raw = tmp_path / 'raw'
  raw.write_bytes(b'\7' * 12)

  def link(file):
    file['linked'] = h5py.ExternalLink(str(secret), '/kernel')
    file['model_weights'] = h5py.ExternalLink(str(secret), '/')

  assert read_bytes(h5(ARRAYS, link)).keys() == ARRAYS.keys()
  with pytest.raises(ValueError, match='keeps raw in another file'):
    read_bytes(h5({}, lambda file: file.create_dataset(
        'raw', (3,), 'f4', external=[(str(raw), 0, 12)])))
  layout = h5py.VirtualLayout((3,), 'f8')
  layout[:] = h5py.VirtualSource(str(secret), 'kernel', (3,))
  with pytest.raises(ValueError, match='keeps virtual in another file'):
    read_bytes(h5({}, lambda file: file.create_virtual_dataset('virtual', layout)))


def test_without_h5py_the_extra_is_named(monkeypatch, read_bytes):
  files = h5(ARRAYS), keras3()
  monkeypatch.setitem(sys.modules, 'h5py', None)
  for data in files:
    with pytest.raises(ValueError, match=r"^Refused to read [^\n]*pip install 'dfkd_jax\[h5\]'\.$"):
      read_bytes(data)


@pytest.mark.parametrize('share', np.arange(10) / 10)
@pytest.mark.parametrize('data', [h5(keras2()), keras3()], ids=['h5', 'keras'])
def test_truncated_files_give_one_clear_error(data, share, read_bytes):
  with pytest.raises(ValueError, match=r'^(Could not|Refused to) read [^\n]*weights: it [^\n]*$'):
    read_bytes(data[:int(share * len(data))])


@hypothesis.settings(
    deadline=None, derandomize=True, suppress_health_check=['function_scoped_fixture'])
@hypothesis.given(
    data=st.sampled_from([h5(keras2()), h5(NUMBERED, label), keras3()]),
    where=st.floats(0, 1, exclude_max=True), what=st.binary(min_size=1, max_size=4))
def test_damaged_files_give_arrays_or_a_value_error(data, where, what, read_bytes):
  data = bytearray(data)
  where = int(where * len(data))
  data[where:where + len(what)] = what
  with contextlib.suppress(ValueError):
    assert all(isinstance(array, np.ndarray) for array in read_bytes(bytes(data)).values())


def in_keras(data):
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('model.weights.h5', data)
  return stream.getvalue()


@pytest.mark.parametrize('form', [bytes, in_keras])
def test_arrays_are_bounded_by_the_memory_too(form, read_bytes, monkeypatch):
  make = lambda file: [
      file.create_dataset(f'{name}/kernel', data=np.zeros(10**5, np.uint8), compression='gzip')
      for name in 'ab']
  data = form(h5({}, make))
  monkeypatch.setattr(archives, 'LARGEST', 200_000)
  assert read_bytes(data).keys() == {'a/kernel', 'b/kernel'}
  monkeypatch.setattr(archives, 'LARGEST', 199_999)
  with pytest.raises(ValueError, match='it announces 200000 bytes of arrays'):
    read_bytes(data)
