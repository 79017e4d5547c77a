"""Records and metadata of a data set as TFDS has them."""

import contextlib
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax import paths
from dfkd_jax.data.prepare import existing, image_files

Split = tuple  # Images uint8 [N, H, W, C] or Files, labels int [N] and maybe {column: [N] ints or strings}.


class _Known(NamedTuple):
  """How TFDS itself defines a data set: what is written must match."""

  version: str
  image_shape: tuple[int | None, int | None, int] | None = None
  class_names: tuple[str, ...] | None = None


_MOST_CLASSES = 2**20  # That are numbered: more is a mistake, and would fill the memory.
_KNOWN = {
    'mnist': _Known('3.0.1', (28, 28, 1), tuple('0123456789')),
    'kmnist': _Known('3.0.1', (28, 28, 1), tuple('0123456789')),
    'fashion_mnist': _Known('3.0.1', (28, 28, 1), (
        'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')),
    'cifar10': _Known('3.0.2', (32, 32, 3), (
        'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')),
    'cifar100': _Known('3.0.2', (32, 32, 3), tuple(map(str, range(100)))),
    'imagenet2012': _Known('5.1.0', (None, None, 3)),
}


def write(
    name: str, splits: Mapping[str, Split], data_dir: str | os.PathLike, *, class_names: Sequence[str] | None = None
) -> pathlib.Path:
  """Writes `<data_dir>/<name>/<version>/`, whole or not at all; or adds splits, which count when all are there.

  Args:
    name: In snake_case. A data set that TFDS knows gets TFDS' version; any
      other 1.0.0.
    splits: By name of the split (`train`, `test`): images uint8 [N, H, W, C]
      with C of 1, 3 or 4, or `Files` of photos, which are read one after the other;
      labels int [N] from 0; and if wanted a third item: a mapping of further
      columns, each [N] of integers or strings.
    data_dir: Where TFDS looks for data sets; made if it is not there.
    class_names: K names in the order of the labels; None takes those that are
      there already, or that TFDS has for this name, or else numbers.

  Returns:
    The directory written.

  Raises:
    ValueError: If an array is not as said above, differs from what TFDS
      expects of a data set of this name or from splits that are there, a split is
      there already, or a file is no image.
  """
  known = _KNOWN.get(name, _Known('1.0.0'))
  data_dir = paths.expand_path(data_dir, 'data_dir').absolute()
  target = data_dir / name / known.version
  there = existing.find(target, name, splits)
  class_names = _class_names(name, splits, class_names, known.class_names, there)
  _check(name, splits, known.image_shape, len(class_names), there)
  new = [each for each in (target.parent, data_dir, *data_dir.parents) if not os.path.lexists(each)]
  unfinished = data_dir / f'.{name}-{known.version}.incomplete-{uuid.uuid4().hex[:8]}'
  try:
    unfinished.mkdir(parents=True)
    _write_files(unfinished, name, known.version, splits, class_names, there)
    if there:
      existing.merge(unfinished, target, there)
    else:
      target.parent.mkdir(exist_ok=True)
      unfinished.rename(target)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
    for each in new:  # Those that are still empty.
      with contextlib.suppress(OSError):
        each.rmdir()
  return target


def _class_names(
    name: str, splits: Mapping[str, Split], class_names: Sequence[str] | None, known: Sequence[str] | None, there: Any
) -> Sequence[str]:
  """Those given, there, known to TFDS, or numbers."""
  if class_names is None:
    class_names = there.features['label'].names if there else known
  if class_names is None:
    highest = max(_highest(labels) for _, labels, *_ in splits.values())
    if highest >= _MOST_CLASSES:
      raise ValueError(f'Labels of {name!r} reach {highest}, must be below {_MOST_CLASSES} without class names.')
    return [str(i) for i in range(1 + highest)]
  if known and len(class_names) != len(known):
    raise ValueError(f'{name!r} has {len(known)} classes, got {len(class_names)} class names.')
  if twice := next((each for i, each in enumerate(class_names) if each in class_names[:i]), None):
    raise ValueError(f'Classes of {name!r} must have different names, got {twice!r} twice.')
  if there:
    existing.check_names(there, name, class_names)
  return class_names


def _highest(labels: np.ndarray) -> int:
  labels = np.asarray(labels)
  return int(labels.max()) if labels.size and labels.dtype.kind in 'iu' else 0  # Others are refused later.


def _check(
    name: str, splits: Mapping[str, Split], image_shape: Sequence[int | None] | None, num_classes: int, there: Any
) -> None:
  """Raises ValueError unless `write` can write these and TFDS can read them."""
  for each in (name, *splits):
    if not re.fullmatch(r'[a-z][a-z0-9_]*', each):
      raise ValueError(f'Names of data sets and splits must be in snake_case, got {each!r}.')
  kinds = [existing.is_text(there)] if there else []  # Of the columns: whether they are text.
  image_shape = image_shape or (there and there.features['image'].shape)
  for split, (images, labels, *further) in splits.items():
    images, labels = images if isinstance(images, image_files.Files) else np.asarray(images), np.asarray(labels)
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
    kinds.append({key: column.dtype.kind == 'U' for key, column in _columns((images, labels, *further)).items()})
    if kinds[-1] != kinds[0]:
      raise ValueError(f'Columns of {what} must be {sorted(kinds[0])} as in other splits, got {sorted(kinds[-1])}.')


def _write_files(
    folder: pathlib.Path, name: str, version: str, splits: Mapping[str, Split], class_names: Sequence, there: Any
) -> None:
  """Records of these splits, and metadata of a whole data set."""
  import tensorflow_datasets as tfds  # Here: seconds to import.

  infos = list(there.splits.values()) if there else []
  all_jpeg = not there or there.features['image'].encoding_format == 'jpeg'
  columns = {split: _columns(of_split) for split, of_split in splits.items()}
  for split, (images, *_) in splits.items():
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=split, filetype_suffix='array_record')
    path = template.sharded_filepath(shard_index=0, num_shards=1)
    num_bytes, jpeg = _write_records(os.fspath(path), images, columns[split])
    infos.append(tfds.core.SplitInfo(
        name=split, shard_lengths=[len(images)], num_bytes=num_bytes, filename_template=template))
    all_jpeg &= jpeg
  for file in existing.records(there) if there else []:
    (folder / file).touch()  # Stands in for one that stays where it is: its name is looked for.
  features = {'image': tfds.features.Image(
      shape=np.shape(images)[1:], dtype=np.uint8, encoding_format='jpeg' if all_jpeg else 'png')}
  for key in columns[split]:
    column = np.concatenate([of_split[key] for of_split in columns.values()])
    before = getattr(there.features[key], 'num_classes', 0) if there else 0
    is_text = column.dtype.kind == 'U'
    features[key] = tfds.features.Text() if is_text else tfds.features.ClassLabel(
        num_classes=max(before, int(column.max()) + 1))
  features['label'] = tfds.features.ClassLabel(names=[str(name) for name in class_names])
  tfds.folder_dataset.write_metadata(
      data_dir=folder, features=features, split_infos=infos, version=version, check_data=False,
      supervised_keys=('image', 'label'))


def _columns(of_split: Split) -> dict[str, np.ndarray]:
  """All but the images."""
  _, labels, *further = of_split
  return {key: np.asarray(column) for key, column in {'label': labels, **(further[0] if further else {})}.items()}


def _write_records(
    path: str, images: np.ndarray | image_files.Files, columns: Mapping[str, np.ndarray]
) -> tuple[int, bool]:
  """Writes one array_record file of `tf.train.Example`s; returns the bytes in them, and whether all images are JPEG."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  # One record a group: TFDS reads at random. Images are compressed already.
  writer = array_record_module.ArrayRecordWriter(path, 'group_size:1,uncompressed')
  num_bytes, all_jpeg = 0, True
  encoded = images if isinstance(images, image_files.Files) else map(image_files.png, np.asarray(images))
  try:
    for i, image in enumerate(encoded):
      all_jpeg &= image_files.is_jpeg(image)
      example = tf_example_pb2.Example()
      example.features.feature['image'].bytes_list.value.append(image)
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
  return num_bytes, all_jpeg
