"""Sources that unpack to, or announce, far more than their size: one line, and little memory."""

import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from image_arrays import idx

from dfkd_jax.data import prepare
from dfkd_jax.weights.formats import archives

ZEROS = bytes(30_000_000)
NOT_MORE = 10_000_000  # Bytes in memory.


@pytest.fixture
def refused():
  """Returns the error for a source, and asserts that the source was not unpacked as a whole."""
  def read(name, source, splits=('train',)):
    tracemalloc.start()
    try:
      with pytest.raises(ValueError, match=source.name) as error:
        prepare.read(name, source, splits)
      assert tracemalloc.get_traced_memory()[1] < NOT_MORE
    finally:
      tracemalloc.stop()
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1500
    return message
  return read


def zipped_idx(folder, shape, data=ZEROS):
  sizes = b''.join(size.to_bytes(4, 'big') for size in shape)
  path = folder / 'train-images-idx3-ubyte.gz'
  path.write_bytes(gzip.compress(b'\0\0\x08' + bytes([len(shape)]) + sizes + data, 1))
  return path


def test_no_more_of_an_idx_file_is_unpacked_than_it_announces(tmp_path, refused):
  path = zipped_idx(tmp_path, (3, 28, 28))
  assert path.stat().st_size < 200_000
  message = refused('mnist', tmp_path)
  assert 'array of size 2353 into shape (3,28,28)' in message


def test_idx_files_that_announce_more_than_the_memory_are_refused(tmp_path, refused):
  zipped_idx(tmp_path, (2**32 - 1, 2**32 - 1))
  assert f'must be at most {archives.LARGEST}' in refused('mnist', tmp_path)


@pytest.mark.parametrize(
    'change', [lambda data: data[:-1], lambda data: data + b'\0'], ids=['short', 'long'])
@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_idx_files_are_as_long_as_they_announce(tmp_path, change, pack):
  images = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
  idx(tmp_path / 'w', images)
  data = (tmp_path / 'w').read_bytes()
  (tmp_path / 'w').write_bytes(pack(data))
  np.testing.assert_array_equal(prepare.read_idx(tmp_path / 'w'), images)
  (tmp_path / 'w').write_bytes(pack(change(data)))
  with pytest.raises(ValueError, match=r'array of size (29|31) into shape \(2,3,5\)'):
    prepare.read_idx(tmp_path / 'w')


def tar(path, *members):
  with tarfile.open(path, 'w:gz', compresslevel=1) as archive:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return path


@pytest.mark.parametrize('name', ['train.bin', 'fine_label_names.txt'])
def test_members_of_archives_are_bounded(tmp_path, name, refused, monkeypatch):
  monkeypatch.setattr(archives, 'LARGEST', 1_000_000)
  message = refused('cifar100', tar(tmp_path / 'c.tar.gz', (name, ZEROS)))
  assert f'{name!r} has 30000000 bytes, must be at most 1000000' in message


def npz(path, shape, data=b'', **more):
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(
      header, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('train_images.npy', header.getvalue() + data)
    archive.writestr('train_labels.npy', header.getvalue() + data)
    for name, extra in more.items():
      archive.writestr(name, extra)
  return path


@pytest.mark.parametrize(
    'shape', [(10**13,), (5, 10**9), (10**30,), (29_999_999,), (-1,), (2,) * 2000])
def test_headers_of_arrays_must_fit_their_members(tmp_path, shape, refused):
  assert 'bytes of train_' in refused('mine', npz(tmp_path / 'a.npz', shape, ZEROS))


@pytest.mark.parametrize('text', ['[' * 9000, '-' * 9000 + '1', '\x1b[2J' * 2000], ids=range(3))
def test_headers_of_arrays_that_are_none(tmp_path, text, refused):
  path = tmp_path / 'a.npz'
  with zipfile.ZipFile(path, 'w') as archive:
    for name in ('train_images.npy', 'train_labels.npy'):
      length = struct.pack('<H', len(text) + 1)
      archive.writestr(name, b'\x93NUMPY\1\0' + length + text.encode() + b'\n')
  assert 'cannot be read' in refused('mine', path)


def test_arrays_are_bounded_together(tmp_path, refused, monkeypatch):
  monkeypatch.setattr(archives, 'LARGEST', 50_000_000)
  path = npz(tmp_path / 'a.npz', (30_000_000,), ZEROS, unused=ZEROS)
  assert 'at most 50000000 are unpacked' in refused('mine', path)
