"""What is to be prepared and unpacks to far more than it is, or announces it: one line, and none of the memory."""

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
from dfkd_jax.data.prepare import archives as prepare_archives
from dfkd_jax.weights.formats import archives

ZEROS = bytes(30_000_000)
NOT_MORE = 10_000_000  # Bytes in memory.


@pytest.fixture
def refused():
  """What is said of a source, which must not be unpacked as a whole."""
  def read(name, source, splits=('train',)):
    tracemalloc.start()
    try:
      with pytest.raises(ValueError, match=source.name) as error:
        prepare.read(name, source, splits)
      assert tracemalloc.get_traced_memory()[1] < NOT_MORE
    finally:
      tracemalloc.stop()
    said = str(error.value)
    assert said.isprintable()
    assert len(said) < 1500
    return said
  return read


def zipped_idx(folder, shape, data=ZEROS):
  sizes = b''.join(size.to_bytes(4, 'big') for size in shape)
  path = folder / 'train-images-idx3-ubyte.gz'
  path.write_bytes(gzip.compress(b'\0\0\x08' + bytes([len(shape)]) + sizes + data, 1))
  return path


def test_no_more_of_an_idx_file_is_unpacked_than_it_announces(tmp_path, refused):
  path = zipped_idx(tmp_path, (3, 28, 28))
  assert path.stat().st_size < 200_000
  assert 'has more bytes after its header, which does not fit its shape (3, 28, 28)' in refused('mnist', tmp_path)


def test_idx_files_that_announce_more_than_the_memory_are_refused(tmp_path, refused):
  zipped_idx(tmp_path, (2**32 - 1, 2**32 - 1))
  assert f'of which at most {archives.LARGEST} are read' in refused('mnist', tmp_path)


@pytest.mark.parametrize('shape', [(1,) * 65, (), (2**32 - 1,) * 255])
def test_idx_files_have_the_dimensions_of_arrays(tmp_path, shape, refused):
  zipped_idx(tmp_path, shape, b'\0')
  assert 'is not an IDX file of unsigned bytes' in refused('mnist', tmp_path)


@pytest.mark.parametrize('change', [lambda data: data[:-1], lambda data: data + b'\0'], ids=['short', 'long'])
@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_idx_files_are_as_long_as_they_announce(tmp_path, change, pack):
  images = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
  idx(tmp_path / 'w', images)
  data = (tmp_path / 'w').read_bytes()
  (tmp_path / 'w').write_bytes(pack(data))
  np.testing.assert_array_equal(prepare.read_idx(tmp_path / 'w'), images)
  (tmp_path / 'w').write_bytes(pack(change(data)))
  with pytest.raises(ValueError, match=r'bytes after its header, which does not fit its shape \(2, 3, 5\)'):
    prepare.read_idx(tmp_path / 'w')


def tar(path, *members, **options):
  with tarfile.open(path, 'w:gz', compresslevel=1, **options) as archive:
    for name, data, kind in members:
      info = tarfile.TarInfo(name)
      info.size, info.type = len(data), kind
      archive.addfile(info, io.BytesIO(data))
  return path


@pytest.mark.parametrize(('name', 'kind', 'message'), [
    ('train.bin', tarfile.REGTYPE, "announces 30000000 bytes of 'train.bin', which has at most 1000000"),
    ('fine_label_names.txt', tarfile.REGTYPE, "announces 30000000 bytes of 'fine_label_names.txt', which has at most"),
    ('x', tarfile.XHDTYPE, 'header of 30000000 bytes'), ('x', tarfile.XGLTYPE, 'header of 30000000 bytes'),
    ('x', tarfile.GNUTYPE_LONGNAME, 'header of 30000000 bytes'), ('x', tarfile.GNUTYPE_SPARSE, 'holes')])
def test_members_of_archives_are_bounded(tmp_path, name, kind, message, refused, monkeypatch):
  monkeypatch.setattr(prepare_archives, '_LARGEST_MEMBER', 1_000_000)
  assert message in refused('cifar100', tar(tmp_path / 'c.tar.gz', (name, ZEROS, kind)))


def test_holes_that_a_header_announces_are_refused(tmp_path, refused):
  path = tmp_path / 'c.tar.gz'
  with tarfile.open(path, 'w:gz', format=tarfile.PAX_FORMAT) as archive:
    info = tarfile.TarInfo('train.bin')
    info.size, info.pax_headers = 10**6, {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0'}
    archive.addfile(info, io.BytesIO(b'9999999\n' + b'0\n' * 499_996))
  assert 'it has holes' in refused('cifar100', path)


def test_members_of_archives_are_few(tmp_path, refused, monkeypatch):
  monkeypatch.setattr(prepare_archives, '_MEMBERS', 5)
  path = tar(tmp_path / 'c.tar.gz', *[('x', b'', tarfile.REGTYPE)] * 6)
  assert 'has more than 5 members' in refused('cifar100', path)
  path = tar(tmp_path / 'c.tar.gz', *[('x', b'', tarfile.REGTYPE)] * 5)
  assert "has no 'fine_label_names.txt'" in refused('cifar100', path)


def test_headers_after_headers_end(tmp_path, refused):
  path = tar(tmp_path / 'c.tar.gz', *[('x', b'11 path=abc\n', tarfile.XHDTYPE)] * 3000)
  assert 'cannot be read' in refused('cifar100', path)


def npz(path, shape, data=b'', **more):
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(header, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('train_images.npy', header.getvalue() + data)
    archive.writestr('train_labels.npy', header.getvalue() + data)
    for name, extra in more.items():
      archive.writestr(name, extra)
  return path


@pytest.mark.parametrize('shape', [(10**13,), (5, 10**9), (10**30,), (29_999_999,), (-1,), (2,) * 2000])
def test_headers_of_arrays_must_fit_their_members(tmp_path, shape, refused):
  assert 'bytes of train_' in refused('mine', npz(tmp_path / 'a.npz', shape, ZEROS))


@pytest.mark.parametrize('text', ['[' * 9000, '-' * 9000 + '1', '\x1b[2J' * 2000], ids=range(3))
def test_headers_of_arrays_that_are_none(tmp_path, text, refused):
  path = tmp_path / 'a.npz'
  with zipfile.ZipFile(path, 'w') as archive:
    for name in ('train_images.npy', 'train_labels.npy'):
      archive.writestr(name, b'\x93NUMPY\1\0' + struct.pack('<H', len(text) + 1) + text.encode() + b'\n')
  assert 'cannot be read' in refused('mine', path)


def test_arrays_are_bounded_together(tmp_path, refused, monkeypatch):
  monkeypatch.setattr(archives, 'LARGEST', 50_000_000)
  path = npz(tmp_path / 'a.npz', (30_000_000,), ZEROS, unused=ZEROS)
  assert 'at most 50000000 are unpacked' in refused('mine', path)


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_arrays_of_one_name_are_refused(tmp_path, refused):
  path = npz(tmp_path / 'a.npz', (3,), b'abc', **{'train_images.npy': b''})
  assert 'has two arrays of one name' in refused('mine', path)
