"""Loads data sets in the format of TFDS: TensorFlow is needed only for those stored as tfrecord."""

import itertools
import json
import os
import pathlib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax import messages, paths
from dfkd_jax.data.images import BATCH_SIZE, MODES, Shape, decode_image, decode_mask, map_in_threads

EMBEDDED = pathlib.Path(__file__).resolve().parents[1] / 'assets' / 'tensorflow_datasets'
_WELL_KNOWN = {'cifar10', 'cifar100', 'fashion_mnist', 'kmnist', 'mnist'}


class Dataset(NamedTuple):
  """A split of a data set, in the order of its records."""

  images: np.ndarray  # [N, H, W, C] uint8
  labels: np.ndarray  # [N] int32, or masks [N, H, W] uint8
  class_names: tuple[str, ...]  # K; () if a data set of masks has none


def load(name: str, split: str, data_dir: str | os.PathLike | None = None, *,
         image_shape: Shape | None = None, crop: float | None = None,
         resize: bool = False, shard: tuple[int, int] = (0, 1), masks: bool = False) -> Dataset:
  """Decodes a prepared data set into memory; never downloads.

  A data set has images with a class, or images with a mask: a `LabeledImage`, or an image of one
  channel. Only the decoded images stay in memory: 50,000 of 224 x 224 x 3 take 7.5 GB. Raises
  ValueError if a split is not prepared or cannot be read, if its images differ in shape, or if a
  mask differs in size from its image.

  Args:
    name: Name in TFDS, such as `cifar10`, `cifar10:3.0.2` or `imagenet_resized/32x32`. Without a
      version, the newest prepared version is loaded.
    split: Split in the notation of TFDS, such as `test`, `train[:90%]` or `train+test`.
    data_dir: Folder of prepared data sets. None searches the data sets embedded in this package
      (the test set of Fashion-MNIST), then TFDS_DATA_DIR or ~/tensorflow_datasets.
    image_shape: (H, W, C) that images must have. With `crop` or `resize`, images are brought to it.
    crop: Fraction of the short side to keep, in (0, 1]. ImageNet's 0.875 resizes the short side
      to 256 pixels for crops of 224, like torchvision's Resize (bilinear) and CenterCrop. The
      short side becomes round(max(H, W) / crop). If C is 3, grey, palette and CMYK images are
      converted to RGB and alpha is dropped. Not for masks. None: images are not cropped.
    resize: Whether to resize images (bilinear) to `image_shape` and masks (nearest) to its (H, W).
      The aspect ratio may change. Images are converted to C channels as with `crop`.
    shard: (index, count). Loads the records index, index + count, ... of the split.
    masks: Whether masks are loaded from a data set that has both; otherwise the classes are.
  """
  _check_options(image_shape, crop, resize, shard)
  builder = _make_builder(name, find_prepared(name, split, data_dir))
  with messages.reporting_read_errors(f'Split {split!r} of {name!r}'):
    rows = range(builder.info.splits[split].num_examples)[shard[0]::shard[1]]
  if not rows:
    raise ValueError(f'Split {split!r} of {name!r} has no image for shard {shard}.')
  features = dict(builder.info.features.items())
  target, is_mask = _find_labels(features, masks)
  if is_mask and crop is not None:
    raise ValueError(f'crop is {crop}, must be None for {name!r}, which has masks: use resize.')
  is_resized = resize or crop is not None
  channels = image_shape[-1] if is_resized else features['image'].shape[-1]

  def decode(item):
    row, record = item
    raw, label = record['image'], record[target]
    with messages.reporting_read_errors(f'Image {row} of data set {name!r}'):
      image = decode_image(raw, channels, image_shape, crop, resize)
    if is_mask:
      with messages.reporting_read_errors(f'Mask {row} of data set {name!r}'):
        label = decode_mask(label, raw, image_shape[:2] if resize else None)
    return row, image, label

  records = _read_records(name, builder, split, rows, ('image', target)[:1 + is_mask])
  images, labels = _stack(name, map_in_threads(decode, records), len(rows), image_shape)
  has_names = getattr(features[target], 'num_classes', None) is not None
  return Dataset(images, labels, tuple(features[target].names) if has_names else ())


def _check_options(image_shape: Shape | None, crop: float | None, resize: bool,
                   shard: tuple[int, int]) -> None:
  if crop is not None and not 0 < crop <= 1:
    raise ValueError(f'crop is {crop}, must be in (0, 1].')
  if crop is not None and resize:
    raise ValueError(f'crop is {crop}, must be None with resize.')
  if (resize or crop is not None) and (image_shape is None or image_shape[-1] not in MODES):
    raise ValueError(f'image_shape is {image_shape}, must be (H, W, 1, 3 or 4) with '
                     f'{"resize" if resize else "crop"}.')
  if not 0 <= shard[0] < shard[1]:
    raise ValueError(f'shard is {shard}, must be (index, count) with 0 <= index < count.')


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
  """Whether any split of a data set is prepared."""
  return any(_newest_version(root, name) is not None for root in _data_dirs(data_dir))


def find_prepared(
    name: str, split: str, data_dir: str | os.PathLike | None = None) -> pathlib.Path:
  """Finds the folder that has a split, from metadata only, or raises ValueError."""
  parts = {re.split(r'[\[ ]', part.strip())[0] for part in split.split('+')}
  roots, prepared = _data_dirs(data_dir), []
  for folder in filter(None, (_newest_version(root, name) for root in roots)):
    with messages.reporting_read_errors(f'Data set in {folder}'):
      info = json.loads((folder / 'dataset_info.json').read_text(encoding='utf-8'))
      splits = sorted(entry['name'] for entry in info.get('splits', []))
    if parts <= set(splits):
      return folder
    prepared.append(f'{", ".join(splits)} in {folder}')
  base = name.split(':')[0]
  is_known = base in _WELL_KNOWN
  kind = base if is_known else shlex.join(['folder', '--name', base, '--split', min(parts)])
  command = f'python -m dfkd_jax.prepare {kind} --source ... --data_dir {roots[-1]}'
  if prepared:
    raise ValueError(f'Data set {name!r} has no split {split!r}, only {"; ".join(prepared)}. '
                     f'To prepare more: {command}')
  names = {path.parts[-3] for root in roots for path in root.glob('*/*/dataset_info.json')}
  hint = '' if is_known else messages.nearest(base, _WELL_KNOWN | names - {base})
  raise ValueError(f'Data set {name!r} is not prepared in {" or ".join(map(str, roots))}.{hint} '
                   f'To prepare it: {command}')


def _data_dirs(data_dir: str | os.PathLike | None) -> list[pathlib.Path]:
  """Folders to search, in this order."""
  if data_dir is not None:
    return [paths.expand_path(data_dir, 'data_dir')]
  default = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return [EMBEDDED, paths.expand_path(default, 'TFDS_DATA_DIR')]


def _newest_version(root: pathlib.Path, name: str) -> pathlib.Path | None:
  """Returns the folder of the named version of a data set, or of its highest version."""
  name, _, version = name.partition(':')
  folders = [path.parent for path in (root / name).glob('*/dataset_info.json')
             if re.fullmatch(r'\d+\.\d+\.\d+', path.parent.name)
             and version in ('', path.parent.name)]
  return max(folders, key=lambda folder: tuple(map(int, folder.name.split('.'))), default=None)


def _make_builder(name: str, folder: pathlib.Path) -> Any:
  """Returns a TFDS builder for a data set of labelled images that can be read here."""
  import tensorflow_datasets as tfds  # Takes seconds to import.

  with messages.reporting_read_errors(f'Data set in {folder}'):
    builder = tfds.builder_from_directory(folder)
    stored_as = getattr(builder.info.file_format, 'value', None)
  if stored_as != 'array_record' and not (stored_as == 'tfrecord' and find_spec('tensorflow')):
    raise ValueError(f'Data set {name!r} in {folder} is stored as {stored_as}, must be '
                     "array_record, or tfrecord with TensorFlow: pip install 'dfkd_jax[tf]'.")
  features = dict(builder.info.features.items())
  is_uint8 = getattr(features.get('image'), 'np_dtype', None) == np.uint8
  if not is_uint8 or _find_labels(features, False) is None:
    raise ValueError(f'Data set {name!r} has {sorted(features)}, needs a uint8 image, and a label '
                     'or one mask.')
  return builder


def _find_labels(features: Mapping[str, Any], prefer_masks: bool) -> tuple[str, bool] | None:
  """Returns the key of the labels and whether they are masks, or None if there is no such key.

  Classes come first unless `prefer_masks`. A `LabeledImage` is preferred to other images of one
  channel.
  """
  import tensorflow_datasets as tfds

  images = {key: feature for key, feature in features.items()
            if isinstance(feature, tfds.features.Image)}
  classes = None
  if 'label' not in images and hasattr(features.get('label'), 'names'):
    classes = 'label', False
  masks = [key for key, feature in images.items()
           if key != 'image' and feature.shape[-1] == 1 and feature.np_dtype == np.uint8]
  labeled = [key for key in masks if isinstance(images[key], tfds.features.LabeledImage)]
  masks = labeled or masks
  mask = (masks[0], True) if len(masks) == 1 else None
  return (mask or classes) if prefer_masks else (classes or mask)


def _stack(name: str, examples: Iterable[tuple[int, np.ndarray, Any]], count: int,
           image_shape: Shape | None) -> tuple[np.ndarray, np.ndarray]:
  """Returns the images and labels of (row, image, label); raises ValueError if shapes differ."""
  images = None
  for row, image, label in examples:
    if images is None:
      shape, is_mask = tuple(image_shape or image.shape), np.ndim(label) == 2
      images = np.empty((count, *shape), np.uint8)
      labels = np.empty((count, *np.shape(label)), np.uint8 if is_mask else np.int32)
    if image.shape != shape:
      source = 'image_shape' if image_shape else 'the shape of the first image'
      raise ValueError(f'Data set {name!r} has an image {image.shape}, must be {shape}, {source}.')
    images[row], labels[row] = image, label
  return images, labels


def _read_records(name: str, builder: Any, split: str, rows: range,
                  encoded: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields the records of rows, in order and numbered from 0; `encoded` features as bytes."""
  import tensorflow_datasets as tfds

  encoded = {key: tfds.decode.SkipDecoding() for key in encoded}
  with messages.reporting_read_errors(f'Data set {name!r}'):
    if builder.info.file_format.value == 'tfrecord':
      config = tfds.ReadConfig(interleave_cycle_length=1)  # Keeps the order.
      records = tfds.as_numpy(builder.as_dataset(
          split=split, shuffle_files=False, decoders=encoded, read_config=config))
      records = itertools.islice(records, rows.start, None, rows.step)
    else:
      source = builder.as_data_source(split=split, decoders=encoded)
      batches = (rows[start:start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE))
      records = itertools.chain.from_iterable(map(source.__getitems__, map(list, batches)))
    yield from zip(range(len(rows)), records, strict=True)
