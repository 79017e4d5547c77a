"""Archives that unpack to far more than they are: refused by what they announce, before it is unpacked."""

import io
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
from torch_files import Saver, saved

from dfkd_jax import weights
from dfkd_jax.weights.formats import archives

ZEROS = bytes(2_000_000)
NOT_MORE = 1_000_000  # Bytes in memory, of files of some thousand.


def packed(members, method=zipfile.ZIP_DEFLATED, sizes=None):
  """An archive whose directory says of a member the size in `sizes`, whatever it is."""
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w', method) as archive:
    for name, data in members.items():
      archive.writestr(name, data)
    for info in archive.filelist:  # Which the directory is written from.
      info.file_size = (sizes or {}).get(info.filename, info.file_size)
  return stream.getvalue()


def npy(array):
  stream = io.BytesIO()
  np.save(stream, array)
  return stream.getvalue()


def h5(**arrays):
  stream = io.BytesIO()
  with h5py.File(stream, 'w') as file:
    for name, array in arrays.items():
      file[f'{name}/kernel'] = array
  return stream.getvalue()


def unzipped(data):
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def refused(tmp_path):
  """What is said of bytes, which must be refused without ever being unpacked."""
  def read(data):
    (tmp_path / 'w').write_bytes(data)
    tracemalloc.start()
    try:
      with pytest.raises(ValueError, match=r'^Refused to read [^\n]*: it [^\n]*\.$') as error:
        weights.read(tmp_path / 'w')
      assert tracemalloc.get_traced_memory()[1] < NOT_MORE
    finally:
      tracemalloc.stop()
    return str(error.value).partition(': it ')[2]
  return read


TORCH = unzipped(Saver().zip({'a': Saver().tensor(np.ones(3, np.float32))}))


@pytest.mark.parametrize('name', ['archive/data.pkl', 'archive/data/0', 'archive/more'])
@pytest.mark.parametrize('method', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_none_of_pytorch(name, method, refused):
  stream = io.BytesIO(packed({key: data for key, data in TORCH.items() if key != name}, zipfile.ZIP_STORED))
  with zipfile.ZipFile(stream, 'a', method) as archive:
    archive.writestr(name, ZEROS)
  assert refused(stream.getvalue()) == f'has its member {name!r} (2000000 bytes) compressed, as PyTorch has none.'


def test_members_that_share_bytes_are_refused(refused):
  """Whose entries in the directory all lead to the same place, so that few bytes become many."""
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w') as archive:
    for name, data in TORCH.items():
      archive.writestr(name, data)
    archive.writestr('archive/data/0', bytes(1000))
    archive.filelist += [archive.filelist[-1]] * 50
  data = stream.getvalue()
  total = sum(map(len, TORCH.values())) + 51 * 1000
  assert refused(data) == (f"announces {total} bytes of members, the largest 'archive/data/0' (1000 bytes), "
                           f'and the file itself has {len(data)}.')


def test_one_member_may_not_announce_more_than_the_file(refused):
  data = packed(TORCH, zipfile.ZIP_STORED, {'archive/data.pkl': 2**40})
  assert refused(data).startswith(f'announces {2**40 + sum(map(len, TORCH.values())) - len(TORCH["archive/data.pkl"])} '
                                  "bytes of members, the largest 'archive/data.pkl' (1099511627776 bytes), ")


def test_honest_archives_of_pytorch_fill_their_file(tmp_path):
  """The bound is none for members that are most of the file."""
  (tmp_path / 'w').write_bytes(saved('zip', arrays={'a': np.arange(100_000)}))
  np.testing.assert_array_equal(weights.read(tmp_path / 'w')['a'], np.arange(100_000))


@pytest.mark.parametrize('extra', [ZEROS, b'\0'])
def test_what_follows_an_array_is_not_unpacked(extra, refused):
  """A header of 128 bytes, and 4 numbers of 8."""
  data = packed({'a.npy': npy(np.arange(4.0)) + extra})
  assert refused(data) == f'has {160 + len(extra)} bytes of a, whose header says 160.'


@pytest.mark.parametrize('size', [161, archives.LARGEST])
def test_sizes_in_the_directory_must_be_those_of_the_headers(size, refused):
  data = packed({'a.npy': npy(np.arange(4.0))}, sizes={'a.npy': size})
  assert refused(data) == f'has {size} bytes of a, whose header says 160.'


def test_headers_that_tell_the_size_of_the_bomb_are_bounded_together(refused):
  """2 arrays of half the bound and a little more, by their headers too."""
  count, header = archives.LARGEST // 8 + 1, io.BytesIO()
  np.lib.format.write_array_header_1_0(header, {'descr': '<f4', 'fortran_order': False, 'shape': (count,)})
  size = 4 * count + len(header.getvalue())
  data = packed({name: header.getvalue() + ZEROS for name in ('a.npy', 'b.npy')}, sizes={'a.npy': size, 'b.npy': size})
  assert refused(data) == (f"announces {2 * size} bytes of members, the largest 'a.npy' ({size} bytes), "
                           f'of which at most {archives.LARGEST} are unpacked.')


def test_archives_up_to_the_bound_are_read(tmp_path, monkeypatch, refused):
  arrays = {'a': np.arange(4.0), 'b': np.arange(5)}
  data = packed({f'{name}.npy': npy(array) for name, array in arrays.items()})
  (tmp_path / 'w').write_bytes(data)
  monkeypatch.setattr(archives, 'LARGEST', 160 + 168)
  np.testing.assert_array_equal(weights.read(tmp_path / 'w')['b'], arrays['b'])
  monkeypatch.setattr(archives, 'LARGEST', 160 + 167)
  assert refused(data) == ("announces 328 bytes of members, the largest 'b.npy' (168 bytes), "
                           'of which at most 327 are unpacked.')


@pytest.mark.parametrize('method', [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize('name', ['a.npy', 'model.weights.h5'])
def test_methods_that_unpack_at_once_are_refused(name, method, refused):
  assert refused(packed({name: ZEROS}, method)) == (
      f'has its member {name!r} (2000000 bytes) compressed by another method than deflate.')


def test_weights_of_keras_are_bounded(tmp_path, monkeypatch, refused):
  content = h5(dense=np.arange(3.0))
  data = packed({'config.json': ZEROS, 'model.weights.h5': content})
  (tmp_path / 'w').write_bytes(data)
  monkeypatch.setattr(archives, 'LARGEST', len(content))
  np.testing.assert_array_equal(weights.read(tmp_path / 'w')['dense/kernel'], np.arange(3.0))
  monkeypatch.setattr(archives, 'LARGEST', len(content) - 1)
  assert refused(data).startswith(f"announces {len(content)} bytes of members, the largest 'model.weights.h5' ")


def test_weights_of_keras_announce_no_more_than_the_memory_has_room_for(refused):
  size = archives.LARGEST + 1
  assert refused(packed({'model.weights.h5': ZEROS}, sizes={'model.weights.h5': size})) == (
      f"announces {size} bytes of members, the largest 'model.weights.h5' ({size} bytes), "
      f'of which at most {archives.LARGEST} are unpacked.')


@pytest.mark.parametrize(('name', 'size'), [('model.weights.h5', 3000), ('a.npy', 159)])
def test_no_more_is_unpacked_than_announced(name, size, tmp_path):
  (tmp_path / 'w').write_bytes(packed({name: npy(np.arange(4.0)) + 50 * ZEROS}, sizes={name: size}))
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=r'^Could not read [^\n]*: it is truncated or damaged [^\n]*$'):
      weights.read(tmp_path / 'w')
    assert tracemalloc.get_traced_memory()[1] < NOT_MORE
  finally:
    tracemalloc.stop()


def test_the_bound_is_a_third_of_the_memory(monkeypatch):
  pages = {'SC_PHYS_PAGES': 3 * 2**18, 'SC_PAGE_SIZE': 2**12}
  monkeypatch.setattr(archives.os, 'sysconf', pages.__getitem__)
  assert archives._largest() == 2**30
  pages['SC_PHYS_PAGES'] = 2**40
  assert archives._largest() == 2**34
  monkeypatch.delattr(archives.os, 'sysconf')
  assert archives._largest() == 2**34


def test_arrays_are_not_held_twice(tmp_path):
  """The file, and what it unpacks to: not a copy of it besides."""
  (tmp_path / 'w').write_bytes(packed({'a.npy': npy(np.zeros(10**7, np.uint8))}))
  tracemalloc.start()
  try:
    array = weights.read(tmp_path / 'w')['a']
    assert tracemalloc.get_traced_memory()[1] < 1.5 * 10**7
  finally:
    tracemalloc.stop()
  assert not array.flags.writeable


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_arrays_of_one_name_are_refused(refused):
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w') as archive:
    for number in range(2):
      archive.writestr('a.npy', npy(np.full(3, number)))
  assert refused(stream.getvalue()) == 'holds two arrays called a.'


@pytest.mark.parametrize('array', [np.zeros((0, 3)), np.array(7), np.asfortranarray(np.eye(2, 3)), np.zeros((2, 0))])
def test_arrays_of_all_shapes(array, tmp_path):
  (tmp_path / 'w').write_bytes(packed({'a.npy': npy(array)}))
  read = weights.read(tmp_path / 'w')['a']
  assert read.shape == array.shape
  np.testing.assert_array_equal(read, array)
