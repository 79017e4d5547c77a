"""Records and metadata of a data set as TFDS has them."""

import io
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
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
  kinds = []  # Of the columns: whether they are text.
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
    kinds.append({key: column.dtype.kind == 'U' for key, column in _columns((images, labels, *further)).items()})
    if kinds[-1] != kinds[0]:
      raise ValueError(f'Columns of {what} must be {sorted(kinds[0])} as in other splits, got {sorted(kinds[-1])}.')


def _write_files(
    folder: pathlib.Path, name: str, version: str, splits: Mapping[str, Split], class_names: Sequence
) -> None:
  """Records and metadata of a whole data set."""
  import tensorflow_datasets as tfds  # Here: seconds to import.

  infos, columns = [], {split: _columns(of_split) for split, of_split in splits.items()}
  for split, (images, *_) in splits.items():
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=split, filetype_suffix='array_record')
    path = template.sharded_filepath(shard_index=0, num_shards=1)
    num_bytes = _write_records(os.fspath(path), np.asarray(images), columns[split])
    infos.append(tfds.core.SplitInfo(
        name=split, shard_lengths=[len(images)], num_bytes=num_bytes, filename_template=template))
  features = {'image': tfds.features.Image(shape=np.shape(images)[1:], dtype=np.uint8, encoding_format='png')}
  for key in columns[split]:
    column = np.concatenate([of_split[key] for of_split in columns.values()])
    is_text = column.dtype.kind == 'U'
    features[key] = tfds.features.Text() if is_text else tfds.features.ClassLabel(num_classes=int(column.max()) + 1)
  features['label'] = tfds.features.ClassLabel(names=[str(name) for name in class_names])
  tfds.folder_dataset.write_metadata(
      data_dir=folder, features=features, split_infos=infos, version=version, check_data=False,
      supervised_keys=('image', 'label'))


def _columns(of_split: Split) -> dict[str, np.ndarray]:
  """All but the images."""
  _, labels, *further = of_split
  return {key: np.asarray(column) for key, column in {'label': labels, **(further[0] if further else {})}.items()}


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
