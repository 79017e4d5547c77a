"""Loads data sets in the format of TFDS: TensorFlow is needed only for those stored as tfrecord."""

import difflib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax import paths
from dfkd_jax.data.errors import reporting_read_errors
from dfkd_jax.data.images import BATCH_SIZE, MODES, Shape, decode_all, decode_image

EMBEDDED = pathlib.Path(__file__).resolve().parents[1] / 'assets' / 'tensorflow_datasets'
_WELL_KNOWN = {'cifar10', 'cifar100', 'fashion_mnist', 'kmnist', 'mnist'}


class Dataset(NamedTuple):
  """A split of a data set, in the order of its records."""

  images: np.ndarray  # [N, H, W, C] uint8
  labels: np.ndarray  # [N] int32
  class_names: tuple[str, ...]  # K


def load(
    name: str, split: str, data_dir: str | os.PathLike | None = None, *,
    image_shape: Shape | None = None, crop: float | None = None, shard: tuple[int, int] = (0, 1),
) -> Dataset:
  """Decodes a prepared data set into memory; never downloads.

  Only the decoded images stay in memory: 50,000 of 224 x 224 x 3 take 7.5 GB.

  Args:
    name: Name of the data set in TFDS, such as `cifar10`, `cifar10:3.0.2` or
      `imagenet_resized/32x32`. Without a version, the newest prepared version is loaded.
    split: Split in the notation of TFDS, such as `test`, `train[:90%]` or `train+test`.
    data_dir: Folder of prepared data sets. None searches the data sets embedded in this package
      (the test set of Fashion-MNIST), then TFDS_DATA_DIR or ~/tensorflow_datasets.
    image_shape: (H, W, C) that images must have. With `crop`, images are brought to this shape.
    crop: Fraction of the short side to keep, in (0, 1]. ImageNet's 0.875 resizes the short side
      to 256 pixels for crops of 224, like torchvision's Resize (bilinear) and CenterCrop. The
      short side becomes round(max(H, W) / crop). If C is 3, grey, palette and CMYK images are
      converted to RGB and alpha is dropped. None: images are not resized.
    shard: (index, count). Loads the records index, index + count, ... of the split.

  Raises:
    ValueError: The data set or split is not prepared, or is stored as tfrecord and TensorFlow is
      not installed. Or images cannot be decoded, differ in shape, or do not have `image_shape`.
      Or `crop` or `shard` is outside of its range.
  """
  if crop is not None and not 0 < crop <= 1:
    raise ValueError(f'crop is {crop}, must be in (0, 1].')
  if crop is not None and (image_shape is None or image_shape[-1] not in MODES):
    raise ValueError(f'image_shape is {image_shape}, must be (H, W, 1, 3 or 4) with crop.')
  if not 0 <= shard[0] < shard[1]:
    raise ValueError(f'shard is {shard}, must be (index, count) with 0 <= index < count.')
  builder = _make_builder(name, _find_folder(name, split, data_dir))
  features = builder.info.features
  if not {'image', 'label'} <= set(features) or not hasattr(features['label'], 'names'):
    raise ValueError(f'Data set {name!r} has {sorted(features)}, needs an image and a class label.')
  if features['image'].np_dtype != np.uint8:
    raise ValueError(f'Images of {name!r} are {features["image"].np_dtype}, must be uint8.')
  with reporting_read_errors(f'Split {split!r} of {name!r}'):
    size, records = _open_records(builder, split, *shard)
  if not size:
    raise ValueError(f'Split {split!r} of {name!r} has no image for shard {shard}.')
  channels = features['image'].shape[-1] if crop is None else image_shape[-1]
  decode = lambda raw: decode_image(raw, channels, image_shape, crop)
  images, labels = decode_all(name, size, records, image_shape, decode)
  return Dataset(images, labels, tuple(features['label'].names))


def check_prepared(name: str, split: str, data_dir: str | os.PathLike | None = None) -> None:
  """Raises ValueError if a data set or split is not prepared; reads only its metadata."""
  _find_folder(name, split, data_dir)


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
  """Whether any split of a data set is prepared."""
  return any(_newest_version(root, name) is not None for root in _data_dirs(data_dir))


def _data_dirs(data_dir: str | os.PathLike | None) -> list[pathlib.Path]:
  """Folders to search, in this order."""
  if data_dir is not None:
    return [paths.expand_path(data_dir, 'data_dir')]
  default = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return [EMBEDDED, paths.expand_path(default, 'TFDS_DATA_DIR')]


def _find_folder(name: str, split: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
  """Returns the first version folder that has all parts of a split."""
  parts = {re.split(r'[\[ ]', part.strip())[0] for part in split.split('+')}
  roots, prepared = _data_dirs(data_dir), []
  for folder in filter(None, (_newest_version(root, name) for root in roots)):
    with reporting_read_errors(f'Data set in {folder}'):
      info = json.loads((folder / 'dataset_info.json').read_text(encoding='utf-8'))
      splits = sorted(entry['name'] for entry in info.get('splits', []))
    if parts <= set(splits):
      return folder
    prepared.append(f'{", ".join(splits)} in {folder}')
  base = name.split(':')[0]
  known = base in _WELL_KNOWN
  kind = base if known else shlex.join(['folder', '--name', base, '--split', min(parts)])
  command = f'python -m dfkd_jax.prepare {kind} --source ... --data_dir {roots[-1]}'
  if prepared:
    raise ValueError(f'Data set {name!r} has no split {split!r}, only {"; ".join(prepared)}. '
                     f'To prepare more: {command}')
  names = {path.parts[-3] for root in roots for path in root.glob('*/*/dataset_info.json')}
  near = () if known else difflib.get_close_matches(base, _WELL_KNOWN | names - {base}, n=1)
  hint = f' (did you mean {near[0]!r}?)' if near else ''
  raise ValueError(f'Data set {name!r} is not prepared in {" or ".join(map(str, roots))}{hint}. '
                   f'To prepare it: {command}')


def _newest_version(root: pathlib.Path, name: str) -> pathlib.Path | None:
  """Returns the folder of the named version of a data set, or of its highest version."""
  name, _, version = name.partition(':')
  folders = [path.parent for path in (root / name).glob('*/dataset_info.json')
             if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)
             and version in ('', path.parent.name)]
  return max(folders, key=lambda folder: tuple(map(int, folder.name.split('.'))), default=None)


def _make_builder(name: str, folder: pathlib.Path) -> Any:
  """Returns a TFDS builder for a data set that can be read here."""
  import tensorflow_datasets as tfds  # Takes seconds to import.

  with reporting_read_errors(f'Data set in {folder}'):
    builder = tfds.builder_from_directory(os.fspath(folder))
    stored_as = getattr(builder.info.file_format, 'value', None)
  if stored_as != 'array_record' and not (stored_as == 'tfrecord' and _has_tensorflow()):
    raise ValueError(f'Data set {name!r} in {folder} is stored as {stored_as}, must be '
                     "array_record, or tfrecord with TensorFlow: pip install 'dfkd_jax[tf]'.")
  return builder


def _has_tensorflow() -> bool:
  """Whether TensorFlow is installed; does not import it."""
  return importlib.util.find_spec('tensorflow') is not None


def _open_records(
    builder: Any, split: str, index: int, count: int
) -> tuple[int, Iterator[dict[str, Any]]]:
  """Returns the number of records of a shard, and the records in order, with encoded images."""
  import tensorflow_datasets as tfds

  encoded = {'image': tfds.decode.SkipDecoding()}
  if builder.info.file_format.value == 'tfrecord':
    records = tfds.as_numpy(builder.as_dataset(
        split=split, shuffle_files=False, decoders=encoded,
        read_config=tfds.ReadConfig(interleave_cycle_length=1)))  # Keeps the order.
    rows = range(builder.info.splits[split].num_examples)[index::count]
    return len(rows), itertools.islice(records, index, None, count)
  source = builder.as_data_source(split=split, decoders=encoded)
  rows = range(len(source))[index::count]
  batches = (rows[start:start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE))
  return len(rows), itertools.chain.from_iterable(
      source.__getitems__(list(batch)) for batch in batches)
