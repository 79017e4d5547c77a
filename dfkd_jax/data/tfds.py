"""Real images, for evaluation and for training teachers: TFDS, without TensorFlow unless a set needs it.

Distillation itself never reads any. Sets are decoded once into memory, photos of
many sizes to one size; `dfkd_jax.prepare` writes them in the form that is read here.
"""

import contextlib
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
from absl import logging

from dfkd_jax import paths
from dfkd_jax.data.images import DECODED_AT_ONCE, MODES, attempt, decode_all, decode_image

EMBEDDED = pathlib.Path(__file__).resolve().parents[1] / 'assets' / 'tensorflow_datasets'
_WELL_KNOWN = ('cifar10', 'cifar100', 'fashion_mnist', 'kmnist', 'mnist')


class Dataset(NamedTuple):
  """A split of a data set, in the order of its records."""

  images: np.ndarray  # [N, H, W, C] uint8
  labels: np.ndarray  # [N] int32
  class_names: tuple[str, ...]  # K


def load(
    name: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    *,
    image_shape: tuple[int, int, int] | None = None,
    crop: float | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Dataset:
  """Decodes a prepared data set into memory; never downloads.

  What stays there are the images as they are returned: 50,000 of 224 x 224 x 3 are
  7.5 GB. Photos are decoded a few at a time, one a thread.

  Args:
    name: Of the data set, as TFDS writes it: `cifar10`, `cifar10:3.0.2`,
      `imagenet_resized/32x32`. With no version, the newest one prepared.
    split: As TFDS slices it: `test`, `train[:90%]`, `train[55000:]`,
      `train+test`.
    data_dir: Where it was prepared. None looks at what the package embeds (the
      test set of Fashion-MNIST), then where TFDS keeps its data: the environment's
      TFDS_DATA_DIR, or else ~/tensorflow_datasets.
    image_shape: (H, W, C) that the images must have, or with `crop` are brought to.
    crop: The share of the short side that is kept, in (0, 1]: ImageNet's 0.875
      resizes it to 256 pixels for images of 224, as torchvision's Resize (bilinear)
      and CenterCrop do with photos of any size. The short side becomes
      round(max(H, W) / crop); grey, palette and CMYK become RGB, and alpha is
      dropped, where C is 3. None: images are taken as they are.
    shard: (index, count): of the split's records only number index, index + count,
      and so on, for one of `count` processes.

  Raises:
    ValueError: If the data set or its split is not there, is stored as tfrecord
      where TensorFlow is not installed, has images of other or of several shapes, or
      one that cannot be decoded; or if crop or shard are not as said above.
  """
  _check_arguments(image_shape, crop, shard)
  with _quiet():
    builder = _builder(name, split, _roots(data_dir))
    features = builder.info.features
    if not {'image', 'label'} <= set(features) or not hasattr(features['label'], 'names'):
      raise ValueError(f'Data set {name!r} must have an image and a class label, got features {sorted(features)}.')
    if features['image'].np_dtype != np.uint8:
      raise ValueError(f'Images of data set {name!r} must be uint8, got {np.dtype(features["image"].np_dtype)}.')
    size, records = attempt(lambda: _records(builder, split, shard), f'Split {split!r} of {name!r}')
    if not size:
      raise ValueError(f'There is no image in split {split!r} of data set {name!r}, shard {shard[0]} of {shard[1]}.')
    channels = features['image'].shape[-1] if crop is None else image_shape[-1]
    images, labels = decode_all(name, size, records, image_shape, lambda raw: decode_image(raw, channels, image_shape, crop))
    return Dataset(images, labels, tuple(features['label'].names))


def _check_arguments(
    image_shape: tuple[int, int, int] | None, crop: float | None, shard: tuple[int, int]
) -> None:
  if crop is not None and not 0 < crop <= 1:
    raise ValueError(f'crop is {crop}, must be in (0, 1].')
  if crop is not None and (image_shape is None or image_shape[-1] not in MODES):
    raise ValueError(f'image_shape is {image_shape}, must be (H, W, 1, 3 or 4) where images are cropped.')
  if not 0 <= shard[0] < shard[1]:
    raise ValueError(f'shard is {shard}, must be (index, count) with 0 <= index < count.')


def _roots(data_dir: str | os.PathLike | None) -> list[pathlib.Path]:
  """Where to look, in this order."""
  if data_dir is not None:
    return [paths.expand_path(data_dir, 'data_dir')]
  return [EMBEDDED, paths.expand_path(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets', 'TFDS_DATA_DIR')]


def check_prepared(name: str, split: str, data_dir: str | os.PathLike | None = None) -> None:
  """Raises ValueError, as `load` does, if a data set or its split is not there; reads only what says so."""
  _folder(name, split, _roots(data_dir))


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
  """Whether a data set is there, with whatever splits."""
  return any(_newest(root, name) is not None for root in _roots(data_dir))


def _builder(name: str, split: str, roots: list[pathlib.Path]) -> Any:
  """TFDS' builder from the first place that has all of the split's parts."""
  import tensorflow_datasets as tfds  # Here: seconds to import.

  folder = _folder(name, split, roots)
  return _readable(
      attempt(lambda: tfds.builder_from_directory(os.fspath(folder)), f'Data set in {folder}'), name, folder)


def _folder(name: str, split: str, roots: list[pathlib.Path]) -> pathlib.Path:
  """The first that has all of the split's parts."""
  wanted = {re.split(r'[\[ ]', part.strip())[0] for part in split.split('+')}
  present = {}
  for root in roots:
    folder = _newest(root, name)
    if folder is None:
      continue
    present[folder] = attempt(lambda folder=folder: _splits(folder), f'Data set in {folder}')
    if wanted <= set(present[folder]):
      return folder
  plain = name.split(':')[0]
  own = shlex.join(['folder', '--name', plain, '--split', sorted(wanted)[0]])
  kind = plain if plain in _WELL_KNOWN else own
  command = f'python -m dfkd_jax.prepare {kind} --source ... --data_dir {roots[-1]}'
  if present:
    found = '; '.join(f'{", ".join(splits)} in {folder}' for folder, splits in present.items())
    raise ValueError(f'Data set {name!r} has no split {split!r}, only {found}. To prepare more: {command}')
  near = difflib.get_close_matches(plain, {*_WELL_KNOWN, *_prepared(roots)} - {plain}, n=1)
  hint = f' (did you mean {near[0]!r}?)' if near and plain not in _WELL_KNOWN else ''
  raise ValueError(
      f'Data set {name!r} is not prepared in {" or ".join(map(str, roots))}{hint}. To prepare it: {command}')


def _splits(folder: pathlib.Path) -> list[str]:
  """Names of the splits of a data set, without TFDS."""
  found = json.loads((folder / 'dataset_info.json').read_text(encoding='utf-8'))
  return sorted(split['name'] for split in found.get('splits', []))


def _readable(builder: Any, name: str, folder: pathlib.Path) -> Any:
  stored = _stored_as(builder)
  if stored != 'array_record' and not (stored == 'tfrecord' and _has_tensorflow()):
    raise ValueError(f'Data set {name!r} in {folder} is stored as {stored}, must be array_record, '
                     "or tfrecord with TensorFlow: pip install 'dfkd_jax[tf]'.")
  return builder


def _stored_as(builder: Any) -> str | None:
  return getattr(builder.info.file_format, 'value', None)


def _has_tensorflow() -> bool:
  """Whether it is installed; it is not imported."""
  return importlib.util.find_spec('tensorflow') is not None


def _records(builder: Any, split: str, shard: tuple[int, int]) -> tuple[int, Iterator[dict[str, Any]]]:
  """How many records a shard of a split has, and these in order, read as they are asked for, images still encoded."""
  import tensorflow_datasets as tfds

  encoded = {'image': tfds.decode.SkipDecoding()}
  if _stored_as(builder) == 'tfrecord':
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    records = tfds.as_numpy(builder.as_dataset(
        split=split, shuffle_files=False, read_config=in_order, decoders=encoded))
    rows = range(builder.info.splits[split].num_examples)[shard[0]::shard[1]]
    return len(rows), itertools.islice(records, shard[0], None, shard[1])
  source = builder.as_data_source(split=split, decoders=encoded)
  rows = range(len(source))[shard[0]::shard[1]]
  parts = (rows[start:start + DECODED_AT_ONCE] for start in range(0, len(rows), DECODED_AT_ONCE))
  return len(rows), itertools.chain.from_iterable(source.__getitems__(list(part)) for part in parts)


def _newest(root: pathlib.Path, name: str) -> pathlib.Path | None:
  """The directory of a data set's named or else highest version."""
  name, _, version = name.partition(':')
  found = [path.parent for path in (root / name).glob('*/dataset_info.json')]
  found = [path for path in found if re.fullmatch(r'\d+\.\d+\.\d+', path.name) and version in ('', path.name)]
  return max(found, key=lambda path: tuple(map(int, path.name.split('.'))), default=None)


def _prepared(roots: list[pathlib.Path]) -> set[str]:
  """Names of the data sets that lie there."""
  return {path.parent.parent.name for root in roots for path in root.glob('*/*/dataset_info.json')}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Within: TFDS does not advise on image decoders."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)
