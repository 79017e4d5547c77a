"""Reads published archives of data sets, and .npz files, as arrays."""

import gzip
import itertools
import math
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO

import numpy as np

from dfkd_jax import messages, paths
from dfkd_jax.data.errors import reporting_read_errors
from dfkd_jax.data.prepare.writer import Split
from dfkd_jax.weights.formats import archives, npz

_LARGEST_MEMBER = 60_000 * 3074  # Bytes of a file of CIFAR, which has at most 60,000 records.
_MOST_MEMBERS = 1000  # Members of an archive. CIFAR's archives have 8.
_IDX_HEADERS = {b'\0\0\x08' + bytes([ndim]): ndim for ndim in range(1, 5)}  # Of unsigned bytes.
_IDX_NAMES = {'train': 'train', 'test': 't10k'}
_CIFAR_FILES = {
    'cifar10': {'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
                'test': ('test_batch.bin',)},
    'cifar100': {'train': ('train.bin',), 'test': ('test.bin',)},
}
_CIFAR_CLASSES = {'cifar10': 'batches.meta.txt', 'cifar100': 'fine_label_names.txt'}

_Contents = tuple[dict[str, Split], Sequence[str] | None]  # Splits and class names.


def read(name: str, source: str | os.PathLike, splits: Iterable[str]) -> _Contents:
  """Reads the files that the authors of a data set publish.

  Args:
    name: Name of the data set.
    source: A directory of IDX files, the archive of CIFAR's binary version, or an .npz file with
      `<split>_images`, `<split>_labels` and optionally `class_names`.
    splits: Splits to read.

  Returns:
    Splits by name, and class names or None, as `write` takes them.

  Raises:
    ValueError: The source cannot be read, or a split is missing.
  """
  source, splits = paths.expand_path(source, 'source'), tuple(splits)
  if source.is_dir():
    return _from_idx(name, source, splits), None
  if source.suffix == '.npz':
    keys = {split: (f'{split}_images', f'{split}_labels') for split in splits}
    return _from_npz(name, source, keys)
  with reporting_read_errors(repr(str(source))):
    return _from_cifar(name, source, splits)


def read_arrays(name: str, source: str | os.PathLike, split: str = 'test') -> _Contents:
  """Reads one split of your own, with the results and errors of `read`.

  Args:
    name: Name of the data set.
    source: An .npz file with `images` uint8 [N, H, W, C], `labels` int [N] and optionally
      `class_names`.
    split: Name of the split.
  """
  return _from_npz(name, paths.expand_path(source, 'source'), {split: ('images', 'labels')})


def read_idx(path: str | os.PathLike) -> np.ndarray:
  """Reads an IDX file of unsigned bytes, the format of MNIST, gzipped or not.

  Raises:
    ValueError: The file has another format, is too short or too long, or is larger than
      `archives.LARGEST`.
  """
  path = pathlib.Path(path)
  with reporting_read_errors(repr(str(path))), path.open('rb') as file:
    is_gzip = file.read(2) == b'\x1f\x8b'
    file.seek(0)
    return _parse_idx(gzip.GzipFile(fileobj=file) if is_gzip else file)


def _parse_idx(file: BinaryIO) -> np.ndarray:
  """Parses a stream. Unpacks no more bytes than its header announces."""
  ndim = _IDX_HEADERS.get(file.read(4), 0)
  sizes = file.read(4 * ndim)
  if not ndim or len(sizes) < 4 * ndim:
    raise ValueError('it is not an IDX file of unsigned bytes')
  shape = tuple(np.frombuffer(sizes, '>u4').tolist())
  size = math.prod(shape)
  if size > archives.LARGEST:
    raise ValueError(f'it announces {size} bytes, must be at most {archives.LARGEST}')
  raw = file.read(size + 1)
  if len(raw) != size:
    count = 'more' if len(raw) > size else len(raw)
    raise ValueError(f'it has {count} bytes after its header, its shape {shape} needs {size}')
  return np.frombuffer(raw, np.uint8).reshape(shape)


def _from_idx(name: str, folder: pathlib.Path, splits: Iterable[str]) -> dict[str, Split]:
  """Reads images and labels of each split from a folder of IDX files."""

  def read_kind(split, kind):
    file = f'{_IDX_NAMES.get(split, split)}-{kind}-ubyte'
    for path in (folder / f'{file}.gz', folder / file):
      if path.exists():
        return read_idx(path)
    raise ValueError(f'{str(folder)!r} has no {file}.gz for split {split!r} of {name!r}.')

  return {split: Split(read_kind(split, 'images-idx3')[..., None], read_kind(split, 'labels-idx1'))
          for split in splits}


def _from_cifar(name: str, source: pathlib.Path, splits: Iterable[str]) -> _Contents:
  """Reads the binary version of CIFAR-10 or CIFAR-100, without unpacking the archive to disk."""
  if name not in _CIFAR_FILES:
    raise ValueError(f'only archives of {" and ".join(_CIFAR_FILES)} are supported, not {name!r}')
  files = {split: _CIFAR_FILES[name].get(split, (split,)) for split in splits}
  members = _read_members(source, {_CIFAR_CLASSES[name], *itertools.chain(*files.values())})
  parsed = {split: _parse_cifar(split, b''.join(members[file] for file in files[split]), name)
            for split in files}
  return parsed, members[_CIFAR_CLASSES[name]].decode().split()


def _read_members(source: pathlib.Path, names: set[str]) -> dict[str, bytes]:
  """Reads files of a tar archive, by their names without folders. Nothing is written to disk."""
  contents = {}
  with tarfile.open(source, 'r|*') as archive:
    for member in itertools.islice(archive, _MOST_MEMBERS):
      file = os.path.basename(member.name)
      if file in names and member.isfile():
        if member.size > _LARGEST_MEMBER:
          raise ValueError(f'{file!r} has {member.size} bytes, must be at most {_LARGEST_MEMBER}')
        contents[file] = archive.extractfile(member).read()
  if missing := sorted(names - set(contents)):
    raise ValueError(f'it has no {missing[0]!r}')
  return contents


def _parse_cifar(split: str, raw: bytes, name: str) -> Split:
  """Parses records of 1 or 2 label bytes and 3 planes of 32 x 32; adds the columns of TFDS."""
  num_labels = 2 if name == 'cifar100' else 1
  if not raw or len(raw) % (num_labels + 3072):
    raise ValueError(f'split {split!r} has {len(raw)} bytes, no multiple of {num_labels + 3072}')
  records = np.frombuffer(raw, np.uint8).reshape(-1, num_labels + 3072)
  images = records[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  columns = {'id': np.array([f'{split}_{i:05d}' for i in range(len(records))])}
  if num_labels == 2:
    columns['coarse_label'] = records[:, 0]
  return Split(images, records[:, num_labels - 1], columns)


def _from_npz(name: str, source: pathlib.Path, keys: Mapping[str, tuple[str, str]]) -> _Contents:
  """Reads splits from arrays, by the names of their images and labels, and `class_names`."""
  names = list(itertools.chain(*keys.values()))
  with reporting_read_errors(repr(str(source))), zipfile.ZipFile(source) as archive:
    members = {info.filename.removesuffix('.npy'): info for info in archive.infolist()}
    for key in names:
      if key not in members:
        raise ValueError(f'it has no {key!r} for {name!r}, only {messages.safe_names(members)}')
    names += {'class_names'} & set(members)
    archives.check_sizes(members[key] for key in names)
    arrays = {key: npz.read_member(archive, members[key], 'fiubUS') for key in names}
    classes = arrays.get('class_names')
    if classes is not None and (classes.ndim != 1 or classes.dtype.kind not in 'US'):
      raise ValueError(f"'class_names' must be text [K], got {classes.dtype} {classes.shape}")
  splits = {split: Split(*(arrays[key] for key in pair)) for split, pair in keys.items()}
  return splits, None if classes is None else classes.astype(str).tolist()
