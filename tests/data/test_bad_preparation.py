"""Generated arrays, folders and arguments that `python -m dfkd_jax.prepare` must refuse."""

import io
import os

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from refusals import folder, generate, refused

from dfkd_jax.data.prepare.__main__ import main

GOOD = {'images': np.zeros((3, 5, 4, 1), np.uint8), 'labels': np.arange(3)}
# The filters repeat by hand the rules for images and labels.
KINDS = st.sampled_from([np.uint8, np.float32, np.int64, np.bool_])
IMAGES = arrays.arrays(
    KINDS, arrays.array_shapes(min_dims=0, max_dims=5, max_side=5),
    elements=st.just(0)).filter(lambda images: not (
        images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3, 4)
        and images.shape[0] == 3))
LABELS = arrays.arrays(
    KINDS, arrays.array_shapes(min_dims=0, max_dims=2, max_side=5),
    elements=st.integers(0, 1)).filter(
        lambda labels: not (labels.dtype.kind in 'iu' and labels.shape == (3,)))
NOT_FILES = (b'', b'PK\x03\x04', b'Nothing.', b'PK\x05\x06' + bytes(18), bytes(3000))


def npz(**content):
  stream = io.BytesIO()
  np.savez(stream, **content)
  return stream.getvalue()


NPZ = st.one_of(
    IMAGES.map(lambda images: npz(**GOOD | {'images': images})),
    LABELS.map(lambda labels: npz(**GOOD | {'labels': labels})),
    st.integers(1, 9).map(lambda low: npz(**GOOD | {'labels': np.arange(3) - low})),
    st.lists(st.sampled_from('abc'), min_size=1, max_size=2).map(
        lambda names: npz(**GOOD | {'class_names': np.array(names, 'U1')})),
    st.sampled_from(['images', 'labels']).map(lambda name: npz(**{name: GOOD[name]})),
    st.sampled_from([
        npz(), npz(**GOOD | {'class_names': np.array(['a', 'b', 'a'])}),
        npz(**GOOD | {'images': np.array([{}, 1, 2], object)}),
        npz(**GOOD | {'class_names': np.float32(3)}),
        npz(**GOOD | {'labels': np.array(['a', 'b', 'c'])}),
        npz(**GOOD | {'labels': np.full(3, 2**62)})]),
    st.floats(0, 0.97).map(lambda share: npz(**GOOD)[:int(share * len(npz(**GOOD)))]),
    st.sampled_from(NOT_FILES))


def call(*arguments):
  return lambda: main([str(argument) for argument in arguments])


def test_arrays_that_are_no_data_set():

  def run(data):
    with folder() as root:
      (root / 'mine.npz').write_bytes(data)
      refused(call('arrays', '--source', 'mine.npz', '--data_dir', 'data'), root, 'mine')

  generate('arrays to prepare', NPZ, run)


def picture(mode='L', size=(5, 4), kind='png'):
  stream = io.BytesIO()
  Image.new(mode, size).save(stream, kind)
  return stream.getvalue()


def make_empty_folder(root):
  (root / 'photos').mkdir()


def make_file(root):
  (root / 'photos').write_bytes(picture())


def make_loop(root):
  os.symlink('photos', 'photos')


def make_empty_class(root):
  make_photo(root)
  (root / 'photos' / 'cats').mkdir()


def make_photo(root, data=None, name='a.png'):
  (root / 'photos' / 'dogs').mkdir(parents=True)
  (root / 'photos' / 'dogs' / name).write_bytes(picture() if data is None else data)


def make_folder_named_like_a_photo(root):
  make_photo(root)
  (root / 'photos' / 'dogs' / 'b.png').mkdir()
  (root / 'photos' / 'cats').mkdir()


def make_loop_named_like_a_photo(root):
  make_photo(root)
  os.symlink('b.png', root / 'photos' / 'dogs' / 'b.png')


FOLDERS = st.one_of(
    st.sampled_from([
        make_empty_folder, make_file, make_loop, make_empty_class, make_folder_named_like_a_photo,
        make_loop_named_like_a_photo, lambda root: None]),
    st.sampled_from([
        b'', b'none', picture()[:30], picture('I;16'), picture('F', kind='tiff'), bytes(99)]),
    st.floats(0, 0.9).map(lambda share: picture('RGB', (30, 20), 'jpeg')[:int(share * 600)]))


def test_folders_that_are_no_data_set():

  def run(drawn):
    with folder() as root:
      make_photo(root, drawn) if isinstance(drawn, bytes) else drawn(root)
      command = call('folder', '--source', 'photos', '--name', 'mine', '--data_dir', 'data')
      refused(command, root, 'photos')

  generate('folders to prepare', FOLDERS, run)


LISTS = {
    '--labels': [
        b'', b'a.png\n', b'a.png dogs\na.png dogs\n', b'b.png dogs\n', b'\xff\xfe', b'a.png dogs'],
    '--classes': [b'', b'dogs\ndogs\n', b'cats\n', b'\xff\xfe']}
ARGUMENTS = {
    ('arrays',): '--source', ('arrays', '--source'): '--source',
    ('cifar11', '--source', 'mine.npz'): 'train_images',
    ('arrays', '--source', 'gone.npz'): 'gone.npz', ('arrays', '--source', '.'): '.',
    ('arrays', '--source', 'mine.npz', '--labels', 'x'): '--labels',
    ('mnist', '--source', '.'): 'train-images',
    ('mnist', '--source', 'gone'): 'gone', ('cifar10', '--source', 'mine.tar'): 'mine.tar',
    ('arrays', '--source', 'mine.npz', '--name', 'Mine'): "'Mine'",
    ('arrays', '--source', 'mine.npz', '--name', '../mine'): "'../mine'",
    ('arrays', '--source', 'mine.npz', '--split', 'a b'): "'a b'",
    ('arrays', '--source', 'mine.npz', '--split', 'a', 'b'): 'a b',
    ('arrays', '--source', 'mine.npz', '--data_dir', 'mine.npz'): 'mine.npz',
    ('arrays', '--source', 'mine.npz', '--data_dir', 'mine.npz/data'): 'mine.npz',
    ('arrays', '--source', 'mine.npz', '--data_dir', '/proc/sys/data'): '/proc/sys',
    ('arrays', '--source', 'mine.npz', '--name', 'x' * 300): 'x' * 255,
    ('arrays', '--suorce', 'mine.npz'): '--s',
    ('arrays', '--source', 'a\0b.npz'): 'a\\x00b.npz'}


def test_arguments_that_do_not_fit():

  def run(drawn):
    with folder() as root:
      (root / 'mine.npz').write_bytes(npz(**GOOD))
      (root / 'mine.tar').write_bytes(b'none')
      data_dir = [] if '--data_dir' in drawn else ['--data_dir', 'data']
      refused(call(*drawn, *data_dir), root, ARGUMENTS[drawn])

  generate('arguments of prepare', st.sampled_from(sorted(ARGUMENTS)), run)


def test_lists_that_do_not_fit():
  for option, texts in LISTS.items():
    for text in texts[:5]:
      with folder() as root:
        make_photo(root)
        (root / 'list.txt').write_bytes(text)
        source = 'photos/dogs' if option == '--labels' else 'photos'
        name = {b'cats\n': 'dogs', b'b.png dogs\n': 'b.png', b'dogs\ndogs\n': 'dogs'}.get(text)
        refused(call('folder', '--source', source, '--name', 'mine', option, 'list.txt',
                     '--data_dir', 'data'), root, name or 'list.txt')
