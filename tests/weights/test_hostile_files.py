"""Files of PyTorch that were made to exhaust the memory, to hang, or to write to the terminal: one line, at once."""

import io
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save as safetensors
from torch_files import ARRAYS, MAGIC, Call, Name, Saver, dumps, saved

from dfkd_jax import messages, models, weights
from dfkd_jax.weights.formats import pytorch

STORAGE = b'ctorch\nFloatStorage\n'
# Tuples of twice the same, 60 times over: 2^60 steps to hash or to print.
LAUGHS = b'K\x01' + b'2\x86' * 60
DICT = b'\x80\x02}'


def zipped(pickled):
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w') as archive:
    archive.writestr('archive/data.pkl', pickled)
  return stream.getvalue()


@pytest.fixture
def refused(tmp_path):
  """What is said of bytes, which must cost neither memory nor more than a line."""
  def read(data, most=4_000_000):
    (tmp_path / 'w').write_bytes(data)
    tracemalloc.start()
    try:
      with pytest.raises(ValueError, match=r'(Refused to|Could not) read') as error:
        weights.read(tmp_path / 'w')
      assert tracemalloc.get_traced_memory()[1] < most
    finally:
      tracemalloc.stop()
    said = str(error.value)
    assert said.isprintable()
    assert len(said) < 1_200
    return said.partition(': it ')[2]
  return read


@pytest.mark.parametrize('form', [bytes, zipped])
@pytest.mark.parametrize('step', [
    b'\x96' + struct.pack('<Q', 4 << 30), b'\x97', b'\x98', b'\x82\x01', b'\x83\x01\0', b'\x84\x01\0\0\0',
    b'(ibuiltins\nset\n', b'(cbuiltins\nset\no', b'ccollections\nOrderedDict\n)\x81', b'ctorch\nSize\n)}\x92'])
def test_steps_that_pytorch_does_not_write_are_refused(form, step, refused):
  assert refused(form(b'\x80\x05' + step + b'.')) == 'is a pickle with a step that PyTorch does not write.'


@pytest.mark.parametrize('announced', [
    b'\x8e' + struct.pack('<Q', 4 << 30), b'\x8d' + struct.pack('<Q', 4 << 30), b'B' + struct.pack('<I', 2**32 - 1),
    b'\x8b' + struct.pack('<i', 2**31 - 1), b'T' + struct.pack('<i', 2**31 - 1), b'\x95' + struct.pack('<Q', 4 << 30),
    b'X' + struct.pack('<I', 2**32 - 1), b'r' + struct.pack('<I', 2**32 - 1)])
def test_no_step_reserves_what_it_announces(announced, refused):
  for form in (bytes, zipped):
    refused(form(b'\x80\x05N' + announced + b'.'), 1_000_000)


@pytest.mark.parametrize('pickled', [
    DICT + LAUGHS + b'Ns', DICT + b'(' + LAUGHS + b'Nu', b'\x80\x02(' + LAUGHS + b'Nd',
    b'\x80\x04\x8f(' + LAUGHS + b'\x90', b'\x80\x04(' + LAUGHS + b'\x91',
    b'\x80\x02cbuiltins\nset\n](' + LAUGHS + b'e\x85R',
    b'\x80\x02ccollections\nOrderedDict\n]' + LAUGHS + b'N\x86a\x85R'])
def test_nested_tuples_are_no_keys(pickled, refused):
  assert refused(zipped(pickled + b'.')) == 'holds a tuple for a key, where text or a small integer is wanted.'


@pytest.mark.parametrize('place', range(6))
def test_nested_tuples_are_no_records(place, refused):
  parts = [b'X\x07\0\0\0storage', STORAGE, b'X\x01\0\0\x000', b'N', b'K\x01', b'N']
  parts[place] = LAUGHS
  assert refused(zipped(b'\x80\x02(' + b''.join(parts) + b'tQ.'), 1_000_000)


@pytest.mark.parametrize('place', range(8))
def test_nested_tuples_are_no_part_of_a_tensor(place, refused):
  """Of `_rebuild_tensor_v3`, whose dtype is looked up; hooks and the like are not looked at."""
  record = b'(X\x07\0\0\0storage' + STORAGE + b'X\x01\0\0\x000NK\x01tQ'
  parts = [record, b'K\0', b'K\x01\x85', b'K\x01\x85', b'\x89', b'N', b'ctorch\nfloat32\n', b'N']
  parts[place] = LAUGHS
  assert refused(zipped(b'\x80\x02}U\x01actorch._utils\n_rebuild_tensor_v3\n(' + b''.join(parts) + b'tRs.'), 1_000_000)


def test_keys_of_legacy_storages_are_text(refused):
  head = b''.join(map(dumps, (MAGIC, 1001, {'little_endian': True}, {})))
  assert refused(head + b'\x80\x02]' + LAUGHS + b'a.') == 'holds a tuple for the key of a storage.'


@pytest.mark.parametrize('number', [2**61 - 1, -2**61, 2**3000], ids=['hash', 'negative', 'long'])
def test_integers_that_are_keys_are_small(number, refused):
  """Multiples of 2^61 - 1 have the same hash."""
  assert 'for a key, where text or a small integer is wanted' in refused(Saver().zip({number: 1}))


@pytest.mark.parametrize('name', [b'builtins\nset', b'torch\nSize', b'collections\nOrderedDict'])
def test_lists_are_not_copied_again_and_again(name, refused):
  """Each copy would cost the file 9 bytes and the memory thousands."""
  list_ = b'\x80\x02](' + b'K\x01K\x02\x86' * 1000 + b'eq\x01'
  copies = b'c' + name + b'\nq\x02' + b'h\x02h\x01\x85R' * 500
  said = refused(zipped(list_.replace(b'\x86', b'') + copies + b'.' if name != b'collections\nOrderedDict'
                        else list_ + copies + b'.'))
  assert said.endswith('of the same list again and again.')


def test_text_is_no_list_of_its_characters(refused):
  said = refused(zipped(b'\x80\x02ctorch\nSize\nX' + struct.pack('<I', 10**5) + b'a' * 10**5 + b'\x85R.'))
  assert said == 'makes a tuple of something else than a list.'


def test_pickles_are_bounded(monkeypatch, refused, tmp_path):
  data = {form: saved(form) for form in ('zip', 'legacy')}
  monkeypatch.setattr(pytorch, '_LARGEST_PICKLE', 500)
  for each in data.values():
    assert refused(each) == 'holds a pickle of more than 500 bytes.'
  (tmp_path / 'small').write_bytes(saved('legacy', arrays={'a': np.arange(1000)}))  # Numbers beside it do not count.
  np.testing.assert_array_equal(weights.read(tmp_path / 'small')['a'], np.arange(1000))


@pytest.mark.parametrize('shape', [(1,) * 65, (2**80, 1), (1.5,), 'ab'])
def test_shapes_are_those_of_arrays(shape, refused):
  saver = Saver()
  assert 'holds a tensor with' in refused(saver.zip({'a': saver.tensor(np.ones(3), shape=shape, strides=(1,))}))


@pytest.mark.parametrize('form', ['zip', 'legacy'])
def test_states_and_old_ways_to_save_are_read(form, tmp_path):
  """OrderedDicts of Python 2, which are called with a list of pairs, and attributes, which are of no use."""
  saver = Saver()
  pairs = [[name, saver.tensor(array)] for name, array in ARRAYS.items()]
  tree = {'state_dict': Call(Name('collections', 'OrderedDict'), (pairs,)), 'seen': {1, 2, 'a'}, 3: 'epochs',
          'size': Call(Name('torch', 'Size'), ((2, 3),))}
  (tmp_path / 'w').write_bytes(getattr(saver, form)(tree))
  read = weights.read(tmp_path / 'w')
  assert list(read) == list(ARRAYS)
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(read[name], array)


def test_attributes_are_not_set():
  """Such as `items` of an OrderedDict, which its readers call."""
  build = b'ccollections\nOrderedDict\n)R}U\x05itemsccollections\nOrderedDict\nsb.'
  tree = pytorch._Unpickler(pytorch._Stream(b'\x80\x02' + build)).load()
  assert type(tree).__name__ == 'OrderedDict'
  assert not vars(tree)


@pytest.mark.parametrize('pickled', [
    pickle.dumps({'\x1b[2J' * 10**5: 1}, 2), b'\x80\x02cos\n' + b'\x1b[2J' * 10**5 + b'\n.',
    b'\x80\x02}(' + b''.join(b'U\x05key%02d' % i + b'N' for i in range(99)) + b'u.'], ids=['key', 'call', 'keys'])
def test_names_of_a_file_are_cut_off_and_harmless(pickled, refused):
  assert len(refused(zipped(pickled), 8_000_000)) < 500


def test_names_of_arrays_that_do_not_fit_are_cut_off(tmp_path):
  (tmp_path / 'w').write_bytes(safetensors({'\x1b[2J\n' * 10**5 + '.w': np.ones(3, np.float32)}))
  with pytest.raises(ValueError, match='does not fit') as error:
    weights.load(tmp_path / 'w', models.create('convnet', 5, widths=(2, 3), strides=(1, 2)), (6, 4, 3))
  assert str(error.value).isprintable()
  assert len(str(error.value)) < 400


def test_prefixes_without_end_are_not_dropped(tmp_path):
  """Each takes the time of the whole name."""
  (tmp_path / 'w').write_bytes(safetensors({'module.' * 150_000 + 'w': np.ones(3)}))
  assert list(weights.read(tmp_path / 'w')) == ['module.' * 149_992 + 'w']


@pytest.mark.parametrize(('value', 'text'), [
    ('conv1.weight', 'conv1.weight'), ('a\n\x1b[2J\u202e', r'a\n\x1b[2J\u202e'), ('a' * 90, 'a' * 77 + '...'),
    ('a' * 80, 'a' * 80), (7, '7'), (None, 'None'), (10**5000, 'a number of 16610 bits'), ((1, 2), 'a tuple'),
    (b'\0', r"b'\x00'"), ({}, 'a dict')], ids=range(10))
def test_what_is_shown_of_a_file(value, text):
  assert messages.safe_name(value) == text


def test_a_line_is_cut_off():
  assert messages.first_line('a\n  b\x1b') == r'a b\x1b'
  assert messages.first_line('a' * 1000) == 'a' * 1000
  assert messages.first_line('a' * 10**6) == 'a' * 997 + '...'


@pytest.mark.parametrize('metadata', ['{"probe":5}', '{"probe":[[1]]}', '5', '[' * 5000, '{"probe":"\\u001b[2J"}'])
def test_metadata_that_is_no_text_costs_one_line(metadata, tmp_path):
  header = f'{{"__metadata__":{metadata}}}'.encode()
  (tmp_path / 'w').write_bytes(struct.pack('<Q', len(header)) + header)
  if 'probe' not in metadata:
    with pytest.raises(ValueError, match='is no safetensors file'):
      weights.read_metadata(tmp_path / 'w')
    assert weights.stored_probe(tmp_path / 'w') is None
    return
  with pytest.raises(ValueError, match=r'The probe in the metadata of .*w is damaged') as error:
    weights.stored_probe(tmp_path / 'w')
  assert str(error.value).isprintable()


def test_a_header_that_announces_more_than_the_library_reads_is_not_read(tmp_path):
  (tmp_path / 'w').write_bytes(struct.pack('<Q', 2**40) + b'{}')
  with pytest.raises(ValueError, match='is no safetensors file'):
    weights.read_metadata(tmp_path / 'w')
