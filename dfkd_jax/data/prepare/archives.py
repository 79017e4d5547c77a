"""What the authors of data sets publish, as arrays."""

import gzip
import math
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from dfkd_jax import messages, paths
from dfkd_jax.data.prepare.writer import Split
from dfkd_jax.weights.formats import archives, npz

_DIMENSIONS = 64  # Of an array of NumPy.
_LARGEST_MEMBER = 60_000 * 3074  # Bytes of a file of CIFAR: none has more records than that.
_LARGEST_NOTE = 2**20  # Bytes of its names of classes, and of what an archive has to say of a member.
_MEMBERS = 1000  # Of an archive: CIFAR's have 8.
_IDX = {'train': 'train', 'test': 't10k'}
_CIFAR_FILES = {
    'cifar10': {'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)), 'test': ('test_batch.bin',)},
    'cifar100': {'train': ('train.bin',), 'test': ('test.bin',)},
}
_CIFAR_NAMES = {'cifar10': 'batches.meta.txt', 'cifar100': 'fine_label_names.txt'}


def read_idx(path: str | os.PathLike) -> np.ndarray:
  """An array of unsigned bytes out of an IDX file (that of MNIST), gzipped or not.

  Raises:
    ValueError: If it is no such file, too short or long, or larger than `archives.LARGEST`.
  """
  with pathlib.Path(path).open('rb') as file:
    packed = file.read(2) == b'\x1f\x8b'
    file.seek(0)
    return _idx(gzip.GzipFile(fileobj=file) if packed else file, str(path))


def _idx(file: BinaryIO, path: str) -> np.ndarray:
  """Of a stream, of which no more is unpacked than its header announces."""
  begin = file.read(4)
  count = begin[3] if begin[:3] == b'\0\0\x08' and len(begin) == 4 else 0
  sizes = file.read(4 * count)
  if not 0 < count <= _DIMENSIONS or len(sizes) < 4 * count:
    raise ValueError(f'{path!r} is not an IDX file of unsigned bytes.')
  shape = tuple(np.frombuffer(sizes, '>u4').tolist())
  size = math.prod(shape)
  if size > archives.LARGEST:
    raise ValueError(f'{path!r} announces {size} bytes, of which at most {archives.LARGEST} are read.')
  raw = file.read(size + 1)
  if len(raw) != size:
    has = 'more' if len(raw) > size else len(raw)
    raise ValueError(f'{path!r} has {has} bytes after its header, which does not fit its shape {shape}.')
  return np.frombuffer(raw, np.uint8).reshape(shape)


def _from_idx(name: str, source: pathlib.Path, splits: Iterable[str]) -> tuple[dict[str, Split], None]:
  """The four files of MNIST and its likes, in a directory."""
  found = {}
  for split in splits:
    arrays = []
    for kind in ('images-idx3', 'labels-idx1'):
      file = f'{_IDX.get(split, split)}-{kind}-ubyte'
      paths = [path for path in (source / f'{file}.gz', source / file) if path.exists()]
      if not paths:
        raise ValueError(f'{str(source)!r} has no {file}.gz, of which split {split!r} of {name!r} is made.')
      arrays.append(read_idx(paths[0]))
    found[split] = arrays[0][..., None], arrays[1]
  return found, None


def _from_cifar(name: str, source: pathlib.Path, splits: Iterable[str]) -> tuple[dict[str, Split], list[str]]:
  """The binary version of CIFAR-10 or CIFAR-100, read out of the archive without unpacking it to disk."""
  if name not in _CIFAR_FILES:
    raise ValueError(f'An archive can be read for {" and ".join(map(repr, _CIFAR_FILES))}, not for {name!r}.')
  files = {split: _CIFAR_FILES[name].get(split, (split,)) for split in splits}
  wanted = {_CIFAR_NAMES[name], *(file for of_split in files.values() for file in of_split)}
  raw = _from_tar(source, {file: _LARGEST_NOTE if file == _CIFAR_NAMES[name] else _LARGEST_MEMBER for file in wanted})
  if missing := sorted(wanted - set(raw)):
    raise ValueError(f'{str(source)!r} has no {missing[0]!r}, of which {name!r} is made.')
  found = {split: _cifar_split(split, b''.join(map(raw.get, of_split)), name) for split, of_split in files.items()}
  return found, raw[_CIFAR_NAMES[name]].decode().split()


class _Member(tarfile.TarInfo):
  """Of an archive. What it says of other members and of holes is held in memory whatever its size: here it has none."""

  def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:  # What tarfile has for subclasses.
    if self.type == tarfile.GNUTYPE_SPARSE or (not self.isreg() and self.size > _LARGEST_NOTE):
      raise tarfile.ReadError(f'it has a header of {self.size} bytes, or holes')
    return super()._proc_member(archive)

  def _proc_gnusparse_10(self, *_: Any) -> None:
    raise tarfile.ReadError('it has holes')


def _from_tar(source: pathlib.Path, largest: Mapping[str, int]) -> dict[str, bytes]:
  """Files of an archive by their names without folders; `largest` has those that are wanted, and the most bytes."""
  raw = {}
  with tarfile.open(source, 'r|*', tarinfo=_Member) as archive:
    for number, member in enumerate(archive):
      file = os.path.basename(member.name)
      if number >= _MEMBERS:
        raise tarfile.ReadError(f'it has more than {_MEMBERS} members')
      if file in largest and member.isfile():
        if member.size > largest[file]:
          raise tarfile.ReadError(f'it announces {member.size} bytes of {file!r}, which has at most {largest[file]}')
        raw[file] = archive.extractfile(member).read()
  return raw


def _cifar_split(split: str, raw: bytes, name: str) -> Split:
  """Images, labels and TFDS' further columns from records of 1 or 2 label bytes and 3 planes of 32 x 32."""
  num_labels = 2 if name == 'cifar100' else 1
  if not raw or len(raw) % (num_labels + 3072):
    raise ValueError(f'Split {split!r} of {name!r} has {len(raw)} bytes, no multiple of {num_labels + 3072}.')
  records = np.frombuffer(raw, np.uint8).reshape(-1, num_labels + 3072)
  images = records[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  columns = {'id': np.array([f'{split}_{i:05d}' for i in range(len(records))])}
  if num_labels == 2:
    columns['coarse_label'] = records[:, 0]
  return images, records[:, num_labels - 1], columns


def _from_npz(name: str, source: pathlib.Path, splits: Iterable[str]) -> tuple[dict[str, Split], list[str] | None]:
  """`<split>_images` and `<split>_labels`, and if there `class_names`."""
  return _npz_arrays(name, source, {split: (f'{split}_images', f'{split}_labels') for split in splits})


def _npz_arrays(
    name: str, source: pathlib.Path, keys: Mapping[str, tuple[str, str]]
) -> tuple[dict[str, Split], list[str] | None]:
  """Splits of the arrays with these names, and if there `class_names`."""
  if source.exists() and not zipfile.is_zipfile(source):
    raise ValueError(f'{str(source)!r} is not an .npz file.')
  with zipfile.ZipFile(source) as archive:
    members = {info.filename.removesuffix('.npy'): info for info in archive.infolist()}
    if len(members) < len(archive.infolist()):
      raise ValueError(f'{str(source)!r} has two arrays of one name.')
    for key in (key for of_split in keys.values() for key in of_split):
      if key not in members:
        raise ValueError(f'{str(source)!r} has no {key!r}, of which {name!r} is made; it has {messages.safe_names(members)}.')
    wanted = {key for of_split in keys.values() for key in of_split} | ({'class_names'} & members.keys())
    try:
      archives.check_sizes(members[key] for key in wanted)
      arrays = {key: npz.read_member(archive, members[key], 'fiubUS') for key in wanted}
    except ValueError as error:  # Of pickled ones, or of damaged headers.
      raise ValueError(f'{str(source)!r} cannot be read: {messages.one_line(error)}') from error
  found = {split: (arrays[images], arrays[labels]) for split, (images, labels) in keys.items()}
  names = arrays.get('class_names')
  if names is not None and (names.ndim != 1 or names.dtype.kind not in 'US'):
    raise ValueError(f"'class_names' in {str(source)!r} must be text [K], got {names.dtype} {names.shape}.")
  return found, None if names is None else names.tolist()


def read(name: str, source: str | os.PathLike, splits: Iterable[str]) -> tuple[dict[str, Split], Sequence[str] | None]:
  """Splits and class names, as `write` takes them, from what the authors publish.

  Args:
    name: Of the data set.
    source: A directory of IDX files, the archive of CIFAR's binary version, or
      an .npz file with `<split>_images`, `<split>_labels` and maybe `class_names`.
    splits: Which ones to read; ValueError if they cannot be.
  """
  source = paths.expand_path(source, 'source')
  reader = _from_idx if source.is_dir() else _from_npz if source.suffix == '.npz' else _from_cifar
  return _read(lambda: reader(name, source, tuple(splits)), source)


def read_arrays(
    name: str, source: str | os.PathLike, split: str = 'test'
) -> tuple[dict[str, Split], Sequence[str] | None]:
  """A split and class names, as `write` takes them, from arrays of one's own.

  Args:
    name: Of the data set.
    source: An .npz file with `images` uint8 [N, H, W, C], `labels` int [N] and maybe
      `class_names`; ValueError if it has not, or cannot be read.
    split: What the images are.
  """
  source = paths.expand_path(source, 'source')
  return _read(lambda: _npz_arrays(name, source, {split: ('images', 'labels')}), source)


def _read(read: Callable[[], Any], source: pathlib.Path) -> Any:
  if not source.exists():
    raise ValueError(f'{str(source)!r} cannot be read: No such file or folder.')
  try:
    return read()
  except ValueError:
    raise
  except Exception as error:  # A damaged file may raise anything.
    raise ValueError(f'{str(source)!r} cannot be read: {messages.one_line(error) or type(error).__name__}') from error
