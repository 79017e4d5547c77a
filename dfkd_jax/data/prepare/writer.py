"""Writes data sets in the array_record format of TFDS: records, and metadata of all splits."""

import itertools
import os
import pathlib
import re
import tempfile
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax import messages, paths
from dfkd_jax.data.images import JPEG, UNLABELLED, encode_file, encode_png, map_in_threads
from dfkd_jax.data.prepare.files import Files, MaskFiles, read_masks

_MOST_CLASSES = 2**20  # Without class names. Larger labels are a mistake and would fill the memory.
_DIGITS = ('3.0.1', (28, 28, 1), list('0123456789'))
_DEFINITIONS = {  # Version, image shape and class names in TFDS, which new files must match.
    'mnist': _DIGITS, 'kmnist': _DIGITS,
    'fashion_mnist': ('3.0.1', (28, 28, 1), [
        'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
        'Ankle boot']),
    'cifar10': ('3.0.2', (32, 32, 3), [
        'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']),
    'cifar100': ('3.0.2', (32, 32, 3), [str(i) for i in range(100)]),
    'imagenet2012': ('5.1.0', (None, None, 3), None)}


class Split(NamedTuple):
  """A split to write: images, labels and further columns, each of N items.

  A pixel of a mask with label 255 is unlabelled.
  """

  images: np.ndarray | Files  # uint8 [N, H, W, C] with C of 1, 3 or 4
  labels: np.ndarray | MaskFiles  # int [N], from 0; or masks int [N, H, W] in 0..255
  columns: Mapping[str, Any] = types.MappingProxyType({})  # Of integers or strings [N].

  @property
  def target(self) -> str:
    """The key of the labels in TFDS."""
    return 'segmentation_label' if self.labels.ndim == 3 else 'label'


def write(name: str, splits: Mapping[str, Split], data_dir: str | os.PathLike, *,
          class_names: Sequence[str] | None = None) -> pathlib.Path:
  """Writes splits to `<data_dir>/<name>/<version>/`, or adds them if the data set exists.

  Returns the directory. After an error or an interruption, no part of the new splits counts.
  Raises ValueError if an array has a wrong shape or dtype, or differs from TFDS' definition or
  the existing splits. Or if a split exists already, or a file is not an image.

  Args:
    name: Name in snake_case. The version is TFDS' version of this data set, or 1.0.0.
    splits: `Split`s by name, such as `train` and `test`. Plain tuples are accepted.
    data_dir: Folder of data sets, created if missing.
    class_names: K names in the order of the labels. None takes the names of the existing data
      set, of TFDS' definition, or numbers. Masks may have labels that are no class, such as void.
  """
  for identifier in (name, *splits):
    if not re.fullmatch(r'[a-z][a-z0-9_]*', identifier):
      raise ValueError(f'Names must be in snake_case, got {identifier!r}.')
  version, image_shape, defined = _DEFINITIONS.get(name, ('1.0.0', None, None))
  folder = paths.expand_path(data_dir, 'data_dir').absolute() / name / version
  info = _read_info(folder, name, splits)
  splits = _check_splits(name, splits, image_shape, info)
  target = next(iter(splits.values())).target
  stored = info and list(info.features[target].names)
  class_names = _choose_class_names(name, splits, class_names, stored, defined)
  parent = next(path for path in folder.parents if path.exists())
  with tempfile.TemporaryDirectory(prefix=f'.{name}.incomplete-', dir=parent) as unfinished:
    unfinished = pathlib.Path(unfinished)
    _write_folder(unfinished, name, version, splits, class_names, info)
    folder.mkdir(parents=True, exist_ok=True)
    # The new splits count once `dataset_info.json` lists them.
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == 'dataset_info.json'):
      path.replace(folder / path.name)
  return folder


def _check_splits(name: str, splits: Mapping[str, tuple], image_shape: tuple | None,
                  info: Any) -> dict[str, Split]:
  """Returns splits as arrays, if TFDS can read them together with the existing splits."""
  image_shape = image_shape or (info and info.features['image'].shape)
  stored = info and {column: _kind(np.dtype(feature.np_dtype), len(feature.shape))
                     for column, feature in info.features.items() if column != 'image'}
  checked = {}
  for key, split in splits.items():
    images, labels, columns = Split(*split)
    images = images if isinstance(images, Files) else np.asarray(images)
    labels = labels if isinstance(labels, MaskFiles) else np.asarray(labels)
    title = f'split {key!r} of {name!r}'
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
      raise ValueError(f'Images of {title} must be uint8 [N, H, W, 1, 3 or 4], '
                       f'got {images.dtype} {images.shape}.')
    shapes = images.shape[:1], images.shape[:3]
    if labels.dtype.kind not in 'iu' or labels.shape not in shapes or not len(images):
      raise ValueError(f'Labels of {title} must be {len(images)} > 0 integers, or masks of shape '
                       f'{images.shape[:3]}, got {labels.dtype} {labels.shape}.')
    if labels.ndim == 3 and isinstance(labels, np.ndarray):
      lowest, highest = labels.min(), labels.max()
      if lowest < 0 or highest > UNLABELLED:
        raise ValueError(f'Masks of {title} are {lowest}..{highest}, must be 0..{UNLABELLED}.')
    image_shape = image_shape or images.shape[1:]
    if images.shape[1:] != image_shape:
      raise ValueError(f'Images of {title} must be {image_shape} each, got {images.shape[1:]}.')
    columns = {column: np.asarray(columns[column]) for column in columns}
    checked[key] = Split(images, labels, columns)
    kinds = {checked[key].target: _kind(labels.dtype, labels.ndim - 1)}
    for column, values in columns.items():
      if values.dtype.kind not in 'iuU' or values.shape != images.shape[:1]:
        raise ValueError(f'Column {column!r} of {title} must be {len(images)} integers or strings, '
                         f'got {values.dtype} {values.shape}.')
      kinds[column] = _kind(values.dtype)
    stored = stored or kinds
    if kinds != stored:
      raise ValueError(f'Columns of {title} must be {stored} as in other splits, got {kinds}.')
  return checked


def _kind(dtype: np.dtype, ndim: int = 0) -> str:
  """Returns the kind of a column from the dtype and the number of axes of an item."""
  if dtype.kind in 'UO':
    return 'strings'
  return 'masks' if ndim else 'integers'


def _choose_class_names(name: str, splits: Mapping[str, Split], class_names: Sequence[str] | None,
                        stored: Sequence[str] | None, defined: Sequence[str] | None) -> list[str]:
  """Returns the given, existing or defined class names, or numbers."""
  names = class_names or stored or defined or ()
  if all(split.labels.ndim == 3 for split in splits.values()):
    names = names or range(1 + _highest_class(name, splits))
  else:
    lowest = min(int(split.labels.min()) for split in splits.values())
    highest = max(int(split.labels.max()) for split in splits.values())
    num_classes = len(names) or _MOST_CLASSES
    if lowest < 0 or highest >= num_classes:
      raise ValueError(f'Labels of {name!r} are {lowest}..{highest}, must be 0..{num_classes - 1}.')
    names = names or range(1 + highest)
  names = [str(item) for item in names]
  if defined and len(names) != len(defined):
    raise ValueError(f'{name!r} has {len(defined)} classes, got {len(names)} class names.')
  if len(set(names)) < len(names):
    raise ValueError(f'{name!r} has class {max(names, key=names.count)!r} twice.')
  for i, (old, new) in enumerate(itertools.zip_longest(stored or names, names)):
    if old != new:
      raise ValueError(f'Class {i} of {name!r} is {new!r}, must be {old!r} as in other splits.')
  return names


def _highest_class(name: str, splits: Mapping[str, Split]) -> int:
  """Returns the highest label of masks below 255."""
  masks = itertools.chain.from_iterable(read_masks(split.labels) for split in splits.values())
  labels = set().union(*(np.unique(mask).tolist() for mask in masks)) - {UNLABELLED}
  if not labels:
    raise ValueError(f'Masks of {name!r} have no class: all pixels are {UNLABELLED}.')
  return max(labels)


def _read_info(folder: pathlib.Path, name: str, new_splits: Iterable[str]) -> Any:
  """Returns the metadata of a data set to which new splits can be added, or None if it is new."""
  if not (folder / 'dataset_info.json').exists():
    return None
  import tensorflow_datasets as tfds

  with messages.reporting_read_errors(f'{str(folder)!r} already exists, but'):
    info = tfds.builder_from_directory(folder).info
    file_format = getattr(info.file_format, 'value', None)
  if existing := sorted(set(info.splits) & set(new_splits)):
    raise ValueError(f'Data set {name!r} already has split {existing[0]!r} in {str(folder)!r}: '
                     'remove that directory to write it again.')
  if file_format != 'array_record':
    raise ValueError(f'Data set {name!r} in {str(folder)!r} is stored as {file_format}, '
                     'must be array_record to add splits.')
  return info


def _write_folder(folder: pathlib.Path, name: str, version: str, splits: Mapping[str, Split],
                  class_names: Sequence[str], stored: Any) -> None:
  """Writes records of new splits, and metadata of new and stored splits, to an empty folder."""
  import tensorflow_datasets as tfds  # Takes seconds to import.

  split_infos = list(stored.splits.values()) if stored else []
  all_jpeg = stored is None or stored.features['image'].encoding_format == 'jpeg'
  for split, data in splits.items():
    images, labels, columns = data
    path = folder / f'{name}-{split}.array_record-00000-of-00001'
    if labels.ndim == 3:
      labels = map_in_threads(lambda mask: encode_png(mask[..., None]), read_masks(labels))
    num_bytes, jpeg = _write_records(os.fspath(path), images, {data.target: labels, **columns})
    split_infos.append(tfds.core.SplitInfo(
        name=split, shard_lengths=[len(images)], num_bytes=num_bytes, filename_template=None))
    all_jpeg &= jpeg
  features = {'image': tfds.features.Image(
      shape=images.shape[1:], dtype=np.uint8, encoding_format='jpeg' if all_jpeg else 'png')}
  for key in columns:
    column = np.concatenate([split.columns[key] for split in splits.values()])
    if column.dtype.kind == 'U':
      features[key] = tfds.features.Text()
    else:
      num_classes = getattr(stored.features[key], 'num_classes', 0) if stored else 0
      features[key] = tfds.features.ClassLabel(num_classes=max(num_classes, int(column.max()) + 1))
  if data.target == 'label':
    features[data.target] = tfds.features.ClassLabel(names=list(class_names))
  else:
    features[data.target] = tfds.features.LabeledImage(
        labels=list(class_names), shape=(*images.shape[1:3], 1), encoding_format='png')
  info = tfds.core.DatasetInfo(
      builder=tfds.core.DatasetIdentity(name, tfds.core.Version(version), os.fspath(folder), ''),
      features=tfds.features.FeaturesDict(features), supervised_keys=('image', data.target))
  info.set_file_format('array_record')
  info.set_splits(tfds.core.SplitDict(split_infos))
  info.write_to_directory(folder)


def _write_records(
    path: str, images: np.ndarray | Files, columns: Mapping[str, Iterable]) -> tuple[int, bool]:
  """Writes `tf.train.Example`s; returns their bytes, and whether all images are JPEG."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  is_files = isinstance(images, Files)
  encoded = map_in_threads(encode_file, images) if is_files else map(encode_png, images)
  # One record a group, because TFDS reads at random. Uncompressed, because images are compressed.
  writer = array_record_module.ArrayRecordWriter(path, 'group_size:1,uncompressed')
  num_bytes, all_jpeg = 0, True
  try:
    for image, *values in zip(encoded, *columns.values(), strict=True):
      all_jpeg &= image.startswith(JPEG)
      example = tf_example_pb2.Example()
      features = example.features.feature
      features['image'].bytes_list.value.append(image)
      for key, value in zip(columns, values, strict=True):
        if isinstance(value, (str, bytes)):
          value = value.encode() if isinstance(value, str) else value
          features[key].bytes_list.value.append(value)
        else:
          features[key].int64_list.value.append(int(value))
      record = example.SerializeToString(deterministic=True)
      num_bytes += len(record)
      writer.write(record)
  finally:
    writer.close()
  return num_bytes, all_jpeg
