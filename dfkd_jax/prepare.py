"""Writes data sets that TFDS reads, without TensorFlow.

  python -m dfkd_jax.prepare fashion_mnist --source DIRECTORY_OF_IDX_FILES
  python -m dfkd_jax.prepare cifar10 --source cifar-10-binary.tar.gz
  python -m dfkd_jax.prepare cifar100 --source cifar-100-binary.tar.gz
  python -m dfkd_jax.prepare my_images --source arrays.npz

TFDS itself can read array_record files without TensorFlow, but not write them.
What is written here plain `tfds.data_source(name, data_dir=...)` reads. Unlike
with TFDS' own writer, records keep the order of the source.
"""

import argparse
import gzip
import io
import math
import os
import pathlib
import re
import shutil
import sys
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Split = tuple  # Images uint8 [N, H, W, C], labels int [N] and maybe {column: [N] ints or strings}.


class _Known(NamedTuple):
  """How TFDS itself defines a data set: what is written must match."""

  version: str
  image_shape: tuple[int, int, int] | None = None
  class_names: tuple[str, ...] | None = None


_KNOWN = {
    'mnist': _Known('3.0.1', (28, 28, 1), tuple('0123456789')),
    'kmnist': _Known('3.0.1', (28, 28, 1), tuple('0123456789')),
    'fashion_mnist': _Known('3.0.1', (28, 28, 1), (
        'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')),
    'cifar10': _Known('3.0.2', (32, 32, 3), (
        'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')),
    'cifar100': _Known('3.0.2', (32, 32, 3), tuple(map(str, range(100)))),
}
_IDX = {'train': 'train', 'test': 't10k'}
_CIFAR_FILES = {
    'cifar10': {'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)), 'test': ('test_batch.bin',)},
    'cifar100': {'train': ('train.bin',), 'test': ('test.bin',)},
}
_CIFAR_NAMES = {'cifar10': 'batches.meta.txt', 'cifar100': 'fine_label_names.txt'}


def write(
    name: str, splits: Mapping[str, Split], data_dir: str | os.PathLike, *, class_names: Sequence[str] | None = None
) -> pathlib.Path:
  """Writes `<data_dir>/<name>/<version>/` in one step: whole, or not at all.

  Args:
    name: In snake_case. A data set that TFDS knows gets TFDS' version; any
      other 1.0.0.
    splits: By name of the split (`train`, `test`): images uint8 [N, H, W, C]
      with C of 1, 3 or 4, labels int [N] from 0, and if wanted a third item: a
      mapping of further columns, each [N] of integers or strings.
    data_dir: Where TFDS looks for data sets; made if it is not there.
    class_names: K names in the order of the labels; None takes those that TFDS
      has for this name, or else numbers.

  Returns:
    The directory written.

  Raises:
    ValueError: If an array is not as said above, differs from what TFDS
      expects of a data set of this name, or the data set is already there.
  """
  version, image_shape, known_names = _KNOWN.get(name, _Known('1.0.0'))
  class_names = known_names if class_names is None else class_names
  if known_names and len(class_names) != len(known_names):
    raise ValueError(f'{name!r} has {len(known_names)} classes, got {len(class_names)} class names.')
  if class_names is None:
    class_names = range(1 + max(int(np.max(labels, initial=0)) for _, labels, *_ in splits.values()))
  _check(name, splits, image_shape, len(class_names))
  data_dir = pathlib.Path(data_dir).expanduser().absolute()
  target = data_dir / name / version
  if target.exists():
    raise ValueError(f'Data set {name!r} is already in {str(target)!r}: remove that directory to write it anew.')
  data_dir.mkdir(parents=True, exist_ok=True)
  unfinished = data_dir / f'.{name}-{version}.incomplete-{uuid.uuid4().hex[:8]}'
  unfinished.mkdir()
  try:
    _write_files(unfinished, name, version, splits, class_names)
    target.parent.mkdir(exist_ok=True)
    unfinished.rename(target)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
  return target


def _check(name: str, splits: Mapping[str, Split], image_shape: Sequence[int] | None, num_classes: int) -> None:
  """Raises ValueError unless `write` can write these and TFDS can read them."""
  for each in (name, *splits):
    if not re.fullmatch(r'[a-z][a-z0-9_]*', each):
      raise ValueError(f'Names of data sets and splits must be in snake_case, got {each!r}.')
  for split, (images, labels, *further) in splits.items():
    images, labels = np.asarray(images), np.asarray(labels)
    what = f'split {split!r} of {name!r}'
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
      raise ValueError(f'Images of {what} must be uint8 [N, H, W, 1, 3 or 4], got {images.dtype} {images.shape}.')
    image_shape = image_shape or images.shape[1:]
    if image_shape != images.shape[1:]:
      raise ValueError(f'Images of {what} must be {image_shape} each, got {images.shape[1:]}.')
    if labels.dtype.kind not in 'iu' or labels.shape != images.shape[:1] or not labels.size:
      raise ValueError(f'Labels of {what} must be {len(images)} > 0 integers, got {labels.dtype} {labels.shape}.')
    if labels.min() < 0 or labels.max() >= num_classes:
      raise ValueError(f'Labels of {what} must be in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}.')
    for key, column in (further[0] if further else {}).items():
      if len(column) != len(images):
        raise ValueError(f'Column {key!r} of {what} must have {len(images)} values, got {len(column)}.')


def _write_files(
    folder: pathlib.Path, name: str, version: str, splits: Mapping[str, Split], class_names: Sequence
) -> None:
  """Records and metadata of a whole data set."""
  import tensorflow_datasets as tfds  # Here: seconds to import.

  infos = []
  for split, (images, labels, *further) in splits.items():
    columns = {'label': labels, **(further[0] if further else {})}
    columns = {key: np.asarray(column) for key, column in columns.items()}
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=split, filetype_suffix='array_record')
    path = template.sharded_filepath(shard_index=0, num_shards=1)
    num_bytes = _write_records(os.fspath(path), np.asarray(images), columns)
    infos.append(tfds.core.SplitInfo(
        name=split, shard_lengths=[len(images)], num_bytes=num_bytes, filename_template=template))
  features = {'image': tfds.features.Image(shape=np.shape(images)[1:], dtype=np.uint8, encoding_format='png')}
  for key, column in columns.items():
    is_text = column.dtype.kind == 'U'
    features[key] = tfds.features.Text() if is_text else tfds.features.ClassLabel(num_classes=int(column.max()) + 1)
  features['label'] = tfds.features.ClassLabel(names=[str(name) for name in class_names])
  tfds.folder_dataset.write_metadata(
      data_dir=folder, features=features, split_infos=infos, version=version, check_data=False,
      supervised_keys=('image', 'label'))


def _write_records(path: str, images: np.ndarray, columns: Mapping[str, np.ndarray]) -> int:
  """Writes one array_record file of `tf.train.Example`s; returns the bytes in them."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  # One record a group: TFDS reads at random. PNG is compressed already.
  writer = array_record_module.ArrayRecordWriter(path, 'group_size:1,uncompressed')
  num_bytes = 0
  try:
    for i, image in enumerate(images):
      example = tf_example_pb2.Example()
      example.features.feature['image'].bytes_list.value.append(_png(image))
      for key, column in columns.items():
        feature = example.features.feature[key]
        if column.dtype.kind == 'U':
          feature.bytes_list.value.append(str(column[i]).encode())
        else:
          feature.int64_list.value.append(int(column[i]))
      record = example.SerializeToString(deterministic=True)
      num_bytes += len(record)
      writer.write(record)
  finally:
    writer.close()
  return num_bytes


def _png(image: np.ndarray) -> bytes:
  """One image [H, W, C] as PNG."""
  from PIL import Image

  stream = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, 'png', compress_level=9)
  return stream.getvalue()


def read_idx(path: str | os.PathLike) -> np.ndarray:
  """An array of unsigned bytes out of an IDX file (that of MNIST), gzipped or not.

  Raises:
    ValueError: If it is no such file, or too short or long.
  """
  raw = pathlib.Path(path).read_bytes()
  if raw[:2] == b'\x1f\x8b':
    raw = gzip.decompress(raw)
  if raw[:3] != b'\0\0\x08' or len(raw) < 8 or len(raw) < 4 + 4 * raw[3]:
    raise ValueError(f'{str(path)!r} is not an IDX file of unsigned bytes.')
  shape = tuple(np.frombuffer(raw, '>u4', raw[3], 4).tolist())
  if len(raw) != 4 + 4 * len(shape) + math.prod(shape):
    raise ValueError(f'{str(path)!r} has {len(raw)} bytes, which does not fit its shape {shape}.')
  return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


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
  raw = {}
  with tarfile.open(source, 'r|*') as archive:
    for member in archive:
      if os.path.basename(member.name) in wanted and member.isfile():
        raw[os.path.basename(member.name)] = archive.extractfile(member).read()
  if missing := sorted(wanted - set(raw)):
    raise ValueError(f'{str(source)!r} has no {missing[0]!r}, of which {name!r} is made.')
  found = {split: _cifar_split(split, b''.join(map(raw.get, of_split)), name) for split, of_split in files.items()}
  return found, raw[_CIFAR_NAMES[name]].decode().split()


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
  found = {}
  if not zipfile.is_zipfile(source):
    raise ValueError(f'{str(source)!r} is not an .npz file.')
  with np.load(source) as arrays:
    for split in splits:
      for key in (f'{split}_images', f'{split}_labels'):
        if key not in arrays:
          raise ValueError(f'{str(source)!r} has no {key!r}, of which {name!r} is made; it has {list(arrays)}.')
      found[split] = arrays[f'{split}_images'], arrays[f'{split}_labels']
    return found, arrays['class_names'].tolist() if 'class_names' in arrays else None


def read(name: str, source: str | os.PathLike, splits: Iterable[str]) -> tuple[dict[str, Split], Sequence[str] | None]:
  """Splits and class names, as `write` takes them, from what the authors publish.

  Args:
    name: Of the data set.
    source: A directory of IDX files, the archive of CIFAR's binary version, or
      an .npz file with `<split>_images`, `<split>_labels` and maybe `class_names`.
    splits: Which ones to read; ValueError if they cannot be.
  """
  source = pathlib.Path(source).expanduser()
  reader = _from_idx if source.is_dir() else _from_npz if source.suffix == '.npz' else _from_cifar
  try:
    return reader(name, source, tuple(splits))
  except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f'{str(source)!r} cannot be read: {error}') from error


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(
      prog='python -m dfkd_jax.prepare', description='Writes a data set that TFDS reads, without TensorFlow.')
  parser.add_argument('name', help='mnist, fashion_mnist, kmnist, cifar10, cifar100 or a name of your own')
  parser.add_argument('--source', required=True, help='directory of IDX files, archive of CIFAR (binary) or .npz')
  parser.add_argument('--data_dir', default=os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'))
  parser.add_argument('--splits', nargs='+', default=['train', 'test'])
  flags = parser.parse_args(argv)
  try:
    splits, class_names = read(flags.name, flags.source, flags.splits)
    target = write(flags.name, splits, flags.data_dir, class_names=class_names)
  except (ValueError, OSError) as error:
    print(f'{parser.prog}: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  print(f'Wrote {", ".join(f"{len(split[0])} {key}" for key, split in splits.items())} images to {target}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
