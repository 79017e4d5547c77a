"""Archives that would unpack to far more than they are: refused by the sizes they announce."""

import io
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
from torch_files import saved

from dfkd_jax import weights
from dfkd_jax.weights.formats import archives

ZEROS = bytes(2_000_000)
MOST_MEMORY = 1_000_000  # Bytes, for files of a few thousand.


def pack(members, method=zipfile.ZIP_DEFLATED, sizes=None):
  """An archive. Its directory claims the `sizes` for some members."""
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w', method) as archive:
    for name, data in members.items():
      archive.writestr(name, data)
    for info in archive.filelist:  # The directory is written from these.
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


@pytest.fixture
def refuse(tmp_path):
  """Reads bytes that must be refused without being unpacked. Returns the reason."""
  def read(data):
    (tmp_path / 'w').write_bytes(data)
    tracemalloc.start()
    try:
      with pytest.raises(ValueError, match=r'^Refused to read [^\n]*: it [^\n]*\.$') as error:
        weights.read(tmp_path / 'w')
      assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
      tracemalloc.stop()
    return str(error.value).partition(': it ')[2]
  return read


@pytest.mark.parametrize('extra', [ZEROS, b'\0'])
def test_bytes_after_an_array_are_not_unpacked(extra, refuse):
  """A header of 128 bytes, and 4 numbers of 8."""
  reason = refuse(pack({'a.npy': npy(np.arange(4.0)) + extra}))
  assert reason.startswith(f'has {160 + len(extra)} bytes of a,')
  assert reason.endswith(' 160.')


@pytest.mark.parametrize('size', [161, archives.LARGEST])
def test_sizes_in_the_directory_must_equal_those_in_the_headers(size, refuse):
  reason = refuse(pack({'a.npy': npy(np.arange(4.0))}, sizes={'a.npy': size}))
  assert reason.startswith(f'has {size} bytes of a,')
  assert reason.endswith(' 160.')


def test_headers_with_the_size_of_a_bomb_are_bounded_together(refuse):
  """2 arrays of a little more than half the bound, also by their headers."""
  count, header = archives.LARGEST // 8 + 1, io.BytesIO()
  np.lib.format.write_array_header_1_0(
      header, {'descr': '<f4', 'fortran_order': False, 'shape': (count,)})
  size = 4 * count + len(header.getvalue())
  members = {name: header.getvalue() + ZEROS for name in ('a.npy', 'b.npy')}
  reason = refuse(pack(members, sizes={'a.npy': size, 'b.npy': size}))
  assert f'announces {2 * size} bytes' in reason
  assert str(archives.LARGEST) in reason


def test_archives_up_to_the_bound_are_read(tmp_path, monkeypatch, refuse):
  arrays = {'a': np.arange(4.0), 'b': np.arange(5)}
  data = pack({f'{name}.npy': npy(array) for name, array in arrays.items()})
  (tmp_path / 'w').write_bytes(data)
  monkeypatch.setattr(archives, 'LARGEST', 160 + 168)
  np.testing.assert_array_equal(weights.read(tmp_path / 'w')['b'], arrays['b'])
  monkeypatch.setattr(archives, 'LARGEST', 160 + 167)
  assert refuse(data).startswith('announces 328 bytes of members, but at most 327 ')


def test_weights_of_keras_are_bounded(tmp_path, monkeypatch, refuse):
  content = h5(dense=np.arange(3.0))
  data = pack({'model.weights.h5': content})
  (tmp_path / 'w').write_bytes(data)
  monkeypatch.setattr(archives, 'LARGEST', len(content))
  np.testing.assert_array_equal(weights.read(tmp_path / 'w')['dense/kernel'], np.arange(3.0))
  monkeypatch.setattr(archives, 'LARGEST', len(content) - 1)
  assert refuse(data).startswith(f'announces {len(content)} bytes of members')


def test_files_of_pytorch_are_bounded(monkeypatch, refuse):
  monkeypatch.setattr(archives, 'LARGEST', 80_000)
  data = saved('zip', arrays={'a': np.arange(10_000)})
  assert 'at most 80000 are unpacked' in refuse(data)


@pytest.mark.parametrize('name', ['model.weights.h5', 'archive/data.pkl'])
def test_members_announce_no_more_than_the_memory_has_room_for(name, refuse):
  size = archives.LARGEST + 1
  assert f'announces {size} bytes of members' in refuse(pack({name: ZEROS}, sizes={name: size}))


def test_arrays_are_not_held_twice(tmp_path):
  """In memory are the file and its array, but no copy of the array."""
  (tmp_path / 'w').write_bytes(pack({'a.npy': npy(np.zeros(10**7, np.uint8))}))
  tracemalloc.start()
  try:
    array = weights.read(tmp_path / 'w')['a']
    assert tracemalloc.get_traced_memory()[1] < 1.5 * 10**7
  finally:
    tracemalloc.stop()
  assert not array.flags.writeable


@pytest.mark.parametrize('array', [
    np.zeros((0, 3)), np.array(7), np.asfortranarray(np.eye(2, 3)), np.zeros((2, 0))])
def test_arrays_of_all_shapes(array, tmp_path):
  (tmp_path / 'w').write_bytes(pack({'a.npy': npy(array)}))
  read = weights.read(tmp_path / 'w')['a']
  assert read.shape == array.shape
  np.testing.assert_array_equal(read, array)
