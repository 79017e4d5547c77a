"""Reads published archives of data sets, and .npz files, as arrays."""

import gzip
import itertools
import math
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dfkd_jax import messages, paths
from dfkd_jax.data.prepare.writer import Split
from dfkd_jax.weights.formats import archives

_IDX_HEADERS = {b'\0\0\x08' + bytes([ndim]): ndim for ndim in range(1, 5)}  # Of unsigned bytes.
_CIFAR = {  # Label bytes of a record, file of class names, files of each split.
    'cifar10': (1, 'batches.meta.txt', {
        'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)), 'test': ('test_batch.bin',)}),
    'cifar100': (2, 'fine_label_names.txt', {'train': ('train.bin',), 'test': ('test.bin',)})}

_Contents = tuple[dict[str, Split], Sequence[str] | None]  # Splits and class names.


def read(name: str, source: str | os.PathLike, splits: Iterable[str]) -> _Contents:
  """Returns splits by name, and class names or None, as `write` takes them.

  `source` is a directory of IDX files, the archive of CIFAR's binary version, or an .npz file
  with `<split>_images` uint8 [N, H, W, C], `<split>_labels` int [N] and optionally `class_names`.
  Masks are labels int [N, H, W].
  Raises ValueError if it cannot be read, or has no such split.
  """
  source = paths.expand_path(source, 'source')
  if source.is_dir():
    return _read_idx_folder(name, source, splits), None
  if source.suffix == '.npz':
    return _read_npz(name, source, {key: (f'{key}_images', f'{key}_labels') for key in splits})
  with messages.reporting_read_errors(repr(str(source))):
    return _read_cifar(name, source, splits)


def read_arrays(name: str, source: str | os.PathLike, split: str = 'test') -> _Contents:
  """Reads a split from an .npz file with `images`, `labels` and optionally `class_names`.

  Labels are int [N], or masks int [N, H, W].
  """
  return _read_npz(name, paths.expand_path(source, 'source'), {split: ('images', 'labels')})


def read_idx(path: str | os.PathLike) -> np.ndarray:
  """Reads an IDX file of unsigned bytes, the format of MNIST, gzipped or not.

  Raises ValueError for another format, a wrong length, or more than `archives.LARGEST` bytes.
  """
  with messages.reporting_read_errors(repr(str(path))), open(path, 'rb') as raw:
    file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b'\x1f\x8b' else raw
    ndim = _IDX_HEADERS.get(file.read(4))
    if ndim is None:
      raise ValueError('it is not an IDX file of unsigned bytes')
    shape = np.frombuffer(file.read(4 * ndim), '>u4').tolist()
    size = math.prod(shape)
    if size > archives.LARGEST:
      raise ValueError(f'it announces {size} bytes, must be at most {archives.LARGEST}')
    data = file.read(size + 1)  # A gzipped file may unpack to more than it announces.
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_idx_folder(name: str, folder: pathlib.Path, splits: Iterable[str]) -> dict[str, Split]:
  def read_kind(split, kind):
    file = f'{"t10k" if split == "test" else split}-{kind}-ubyte'
    for path in (folder / f'{file}.gz', folder / file):
      if path.exists():
        return read_idx(path)
    raise ValueError(f'{str(folder)!r} has no {file}.gz for split {split!r} of {name!r}.')

  return {split: Split(read_kind(split, 'images-idx3')[..., None], read_kind(split, 'labels-idx1'))
          for split in splits}


def _read_cifar(name: str, source: pathlib.Path, splits: Iterable[str]) -> _Contents:
  """Reads the binary version of CIFAR-10 or CIFAR-100, without unpacking the archive to disk."""
  if name not in _CIFAR:
    raise ValueError(f'only archives of {" and ".join(_CIFAR)} are supported, not {name!r}')
  num_labels, class_file, files = _CIFAR[name]
  files = {split: files.get(split, (split,)) for split in splits}
  missing, contents = {class_file, *itertools.chain(*files.values())}, {}
  with tarfile.open(source, 'r|*') as archive:
    for member in archive:
      file = os.path.basename(member.name)
      if file in missing and member.isfile():
        if member.size > archives.LARGEST:
          raise ValueError(f'{file!r} has {member.size} bytes, must be at most {archives.LARGEST}')
        contents[file] = archive.extractfile(member).read()
        missing.remove(file)
  if missing:
    raise ValueError(f'it has no {min(missing)!r}')
  parsed = {}
  for split, names in files.items():
    raw = np.frombuffer(b''.join(contents[file] for file in names), np.uint8)
    records = raw.reshape(-1, num_labels + 3072)  # Labels, then 3 planes of 32 x 32.
    columns = {'id': np.array([f'{split}_{i:05d}' for i in range(len(records))])}  # As in TFDS.
    if num_labels == 2:
      columns['coarse_label'] = records[:, 0]
    images = records[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    parsed[split] = Split(images, records[:, num_labels - 1], columns)
  return parsed, contents[class_file].decode().split()


def _read_npz(name: str, source: pathlib.Path, keys: Mapping[str, tuple[str, str]]) -> _Contents:
  """Reads splits from arrays, by the names of their images and labels, and `class_names`."""
  names = list(itertools.chain(*keys.values()))
  with messages.reporting_read_errors(repr(str(source))), zipfile.ZipFile(source) as archive:
    members = {info.filename.removesuffix('.npy'): info for info in archive.infolist()}
    if missing := [key for key in names if key not in members]:
      raise ValueError(
          f'it has no {missing[0]!r} for {name!r}, only {messages.safe_names(members)}')
    names += {'class_names'} & set(members)
    archives.check_sizes(members[key] for key in names)
    arrays = {key: archives.read_member(archive, members[key], 'fiubUS') for key in names}
  splits = {split: Split(*(arrays[key] for key in pair)) for split, pair in keys.items()}
  classes = arrays.get('class_names')
  return splits, None if classes is None else classes.astype(str).ravel().tolist()
