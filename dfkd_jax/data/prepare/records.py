"""Files of one data set: array_record files, and metadata that TFDS reads."""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dfkd_jax.data.errors import reporting_read_errors
from dfkd_jax.data.prepare.image_files import Files, encode_png, is_jpeg


def read_info(folder: pathlib.Path, name: str, new_splits: Iterable[str]) -> Any:
  """Reads the metadata of an existing data set; returns None if there is none.

  Raises ValueError if new splits cannot be added to it.
  """
  if not folder.exists():
    return None
  import tensorflow_datasets as tfds

  with reporting_read_errors(f'{str(folder)!r} already exists, but'):
    info = tfds.builder_from_directory(os.fspath(folder)).info
    file_format = getattr(info.file_format, 'value', None)
  if existing := sorted(set(info.splits) & set(new_splits)):
    raise ValueError(f'Data set {name!r} already has split {existing[0]!r} in {str(folder)!r}: '
                     'remove that directory to write it again.')
  if file_format != 'array_record':
    raise ValueError(f'Data set {name!r} in {str(folder)!r} is stored as {file_format}, '
                     'must be array_record to add splits.')
  return info


def stored_columns(info: Any) -> dict[str, bool]:
  """Returns all columns except the images, and whether they are text."""
  import tensorflow_datasets as tfds

  return {key: isinstance(feature, tfds.features.Text)
          for key, feature in info.features.items() if key != 'image'}


def merge(source: pathlib.Path, target: pathlib.Path, info: Any) -> None:
  """Moves new files to an existing data set, `dataset_info.json` last: new splits count then."""
  stored = _record_files(info)
  for path in sorted(source.iterdir(), key=lambda path: path.name == 'dataset_info.json'):
    if path.name not in stored:
      path.replace(target / path.name)


def write_folder(
    folder: pathlib.Path, name: str, version: str, splits: Mapping[str, tuple],
    class_names: Sequence[str], info: Any,
) -> None:
  """Writes records of new splits, and metadata of all splits, to an empty folder.

  `splits` are checked `Split`s. `info` is the metadata of the existing data set, or None.
  """
  import tensorflow_datasets as tfds  # Takes seconds to import.

  split_infos = list(info.splits.values()) if info else []
  all_jpeg = info is None or info.features['image'].encoding_format == 'jpeg'
  for split, (images, labels, columns) in splits.items():
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=split, filetype_suffix='array_record')
    path = template.sharded_filepath(shard_index=0, num_shards=1)
    num_bytes, jpeg = _write_records(os.fspath(path), images, {'label': labels, **columns})
    split_infos.append(tfds.core.SplitInfo(
        name=split, shard_lengths=[len(images)], num_bytes=num_bytes, filename_template=template))
    all_jpeg &= jpeg
  for file in _record_files(info):
    (folder / file).touch()  # `write_metadata` looks for the files of all splits.
  features = {'image': tfds.features.Image(
      shape=images.shape[1:], dtype=np.uint8, encoding_format='jpeg' if all_jpeg else 'png')}
  for key in columns:
    column = np.concatenate([split[2][key] for split in splits.values()])
    if column.dtype.kind == 'U':
      features[key] = tfds.features.Text()
    else:
      stored = getattr(info.features[key], 'num_classes', 0) if info else 0
      features[key] = tfds.features.ClassLabel(num_classes=max(stored, int(column.max()) + 1))
  features['label'] = tfds.features.ClassLabel(names=list(class_names))
  tfds.folder_dataset.write_metadata(
      data_dir=folder, features=features, split_infos=split_infos, version=version,
      check_data=False, supervised_keys=('image', 'label'))


def _record_files(info: Any) -> set[str]:
  return {file for split in info.splits.values() for file in split.filenames} if info else set()


def _write_records(
    path: str, images: np.ndarray | Files, columns: Mapping[str, np.ndarray]
) -> tuple[int, bool]:
  """Writes `tf.train.Example`s; returns their bytes, and whether all images are JPEG."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  # One record a group, because TFDS reads at random. Uncompressed, because images are compressed.
  writer = array_record_module.ArrayRecordWriter(path, 'group_size:1,uncompressed')
  num_bytes, all_jpeg = 0, True
  try:
    for i, image in enumerate(images if isinstance(images, Files) else map(encode_png, images)):
      all_jpeg &= is_jpeg(image)
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
