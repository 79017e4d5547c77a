"""Files made to exhaust the memory, or to write to the terminal: one line, at once."""

import io
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save as safetensors
from torch_files import ARRAYS, Call, Name, Saver

from dfkd_jax import models, weights
from dfkd_jax.weights.formats import pytorch


def zipped(pickled):
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w') as archive:
    archive.writestr('archive/data.pkl', pickled)
  return stream.getvalue()


@pytest.fixture
def refuse(tmp_path):
  """Reads bytes that must cost neither memory nor more than a line. Returns the reason."""
  def read(data, most=4_000_000):
    (tmp_path / 'w').write_bytes(data)
    tracemalloc.start()
    try:
      with pytest.raises(ValueError, match=r'(Refused to|Could not) read') as error:
        weights.read(tmp_path / 'w')
      assert tracemalloc.get_traced_memory()[1] < most
    finally:
      tracemalloc.stop()
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1_200
    return message.partition(': it ')[2]
  return read


@pytest.mark.parametrize('announced', [
    b'\x8e' + struct.pack('<Q', 4 << 30), b'\x8d' + struct.pack('<Q', 4 << 30),
    b'B' + struct.pack('<I', 2**32 - 1), b'\x8b' + struct.pack('<i', 2**31 - 1),
    b'T' + struct.pack('<i', 2**31 - 1), b'\x95' + struct.pack('<Q', 4 << 30),
    b'X' + struct.pack('<I', 2**32 - 1), b'r' + struct.pack('<I', 2**32 - 1)])
def test_no_step_allocates_what_it_announces(announced, refuse):
  for form in (bytes, zipped):
    refuse(form(b'\x80\x05N' + announced + b'.'), 1_000_000)


@pytest.mark.parametrize('shape', [(1,) * 65, (2**80, 1), (1.5,), 'ab', (10**5000,)], ids=range(5))
def test_shapes_that_no_array_has_cost_one_line(shape, refuse):
  saver = Saver()
  refuse(saver.zip({'a': saver.tensor(np.ones(3), shape=shape, strides=(1,) * len(shape))}))


@pytest.mark.parametrize('form', ['zip', 'legacy'])
def test_states_and_old_ways_to_save_are_read(form, tmp_path):
  """Python 2 calls OrderedDict with a list of pairs. Attributes are ignored."""
  saver = Saver()
  pairs = [[name, saver.tensor(array)] for name, array in ARRAYS.items()]
  tree = {'state_dict': Call(Name('collections', 'OrderedDict'), (pairs,)), 'seen': {1, 2, 'a'},
          3: 'epochs', 'size': Call(Name('torch', 'Size'), ((2, 3),))}
  (tmp_path / 'w').write_bytes(getattr(saver, form)(tree))
  read = weights.read(tmp_path / 'w')
  assert list(read) == list(ARRAYS)
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(read[name], array)


def test_attributes_are_not_set():
  """An example is `items` of an OrderedDict, which readers call."""
  build = b'ccollections\nOrderedDict\n)R}U\x05itemsccollections\nOrderedDict\nsb.'
  tree = pytorch._Unpickler(io.BytesIO(b'\x80\x02' + build)).load()
  assert type(tree).__name__ == 'OrderedDict'
  assert not vars(tree)


@pytest.mark.parametrize('pickled', [
    pickle.dumps({'\x1b[2J' * 10**5: 1}, 2), b'\x80\x02cos\n' + b'\x1b[2J' * 10**5 + b'\n.',
    b'\x80\x02}(' + b''.join(b'U\x05key%02d' % i + b'N' for i in range(99)) + b'u.'],
    ids=['key', 'call', 'keys'])
def test_names_of_a_file_are_short_and_harmless(pickled, refuse):
  assert len(refuse(zipped(pickled), 8_000_000)) < 500


def test_names_of_arrays_that_do_not_fit_are_short(tmp_path):
  (tmp_path / 'w').write_bytes(safetensors({'\x1b[2J\n' * 10**5 + '.w': np.ones(3, np.float32)}))
  module = models.create('convnet', 5, widths=(2, 3), strides=(1, 2))
  with pytest.raises(ValueError, match='does not fit') as error:
    weights.load(tmp_path / 'w', module, (6, 4, 3))
  assert str(error.value).isprintable()
  assert len(str(error.value)) < 400


@pytest.mark.parametrize('metadata', ['{"probe":5}', '{"probe":[[1]]}', '5'])
def test_metadata_that_is_no_text_costs_one_line(metadata, tmp_path):
  header = f'{{"__metadata__":{metadata}}}'.encode()
  (tmp_path / 'w').write_bytes(struct.pack('<Q', len(header)) + header)
  with pytest.raises(ValueError, match='is no safetensors file'):
    weights.read_metadata(tmp_path / 'w')
  assert weights.read_probe(tmp_path / 'w') is None


def test_a_header_of_more_bytes_than_the_library_reads_is_not_read(tmp_path):
  (tmp_path / 'w').write_bytes(struct.pack('<Q', 2**40) + b'{}')
  with pytest.raises(ValueError, match='is no safetensors file'):
    weights.read_metadata(tmp_path / 'w')
