"""Real images, for evaluation and for training teachers: TFDS, without TensorFlow unless a set needs it.

Distillation itself never reads any. Sets are small enough to be decoded once into
memory; `dfkd_jax.prepare` writes them in the form that is read here.
"""

import contextlib
import difflib
import importlib.util
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging

EMBEDDED = pathlib.Path(__file__).resolve().parent / 'assets' / 'tensorflow_datasets'
_WELL_KNOWN = ('cifar10', 'cifar100', 'fashion_mnist', 'kmnist', 'mnist')
_DECODED_AT_ONCE = 1000


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
) -> Dataset:
  """Decodes a prepared data set into memory; never downloads.

  Args:
    name: Of the data set, as TFDS writes it: `cifar10`, `cifar10:3.0.2`,
      `imagenet_resized/32x32`. With no version, the newest one prepared.
    split: As TFDS slices it: `test`, `train[:90%]`, `train[55000:]`,
      `train+test`.
    data_dir: Where it was prepared. None looks at what the package embeds (the
      test set of Fashion-MNIST), then where TFDS keeps its data: the environment's
      TFDS_DATA_DIR, or else ~/tensorflow_datasets.
    image_shape: (H, W, C) that the images must have.

  Raises:
    ValueError: If the data set or its split is not there, is stored as tfrecord
      where TensorFlow is not installed, or has images of other or of several shapes.
  """
  with _quiet():
    builder = _builder(name, split, _roots(data_dir))
    features = builder.info.features
    if not {'image', 'label'} <= set(features) or not hasattr(features['label'], 'names'):
      raise ValueError(f'Data set {name!r} must have an image and a class label, got features {sorted(features)}.')
    size, records = _attempt(lambda: _records(builder, split), f'Split {split!r} of {name!r}')
    images, labels = _decode(name, size, records, image_shape)
    return Dataset(images, labels, tuple(features['label'].names))


def _roots(data_dir: str | os.PathLike | None) -> list[pathlib.Path]:
  """Where to look, in this order."""
  if data_dir is not None:
    return [pathlib.Path(data_dir).expanduser()]
  return [EMBEDDED, pathlib.Path(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets').expanduser()]


def _builder(name: str, split: str, roots: list[pathlib.Path]) -> Any:
  """TFDS' builder from the first place that has all of the split's parts."""
  import tensorflow_datasets as tfds  # Here: seconds to import.

  wanted = {re.split(r'[\[ ]', part.strip())[0] for part in split.split('+')}
  present = {}
  for root in roots:
    folder = _newest(root, name)
    if folder is None:
      continue
    builder = _attempt(lambda folder=folder: tfds.builder_from_directory(os.fspath(folder)), f'Data set in {folder}')
    present[folder] = sorted(builder.info.splits)
    if wanted <= set(present[folder]):
      return _readable(builder, name, folder)
  plain = name.split(':')[0]
  command = f'python -m dfkd_jax.prepare {plain} --source ... --data_dir {roots[-1]}'
  if present:
    found = '; '.join(f'{", ".join(splits)} in {folder}' for folder, splits in present.items())
    raise ValueError(f'Data set {name!r} has no split {split!r}, only {found}. To prepare more: {command}')
  near = difflib.get_close_matches(plain, {*_WELL_KNOWN, *_prepared(roots)} - {plain}, n=1)
  hint = f' (did you mean {near[0]!r}?)' if near and plain not in _WELL_KNOWN else ''
  raise ValueError(
      f'Data set {name!r} is not prepared in {" or ".join(map(str, roots))}{hint}. To prepare it: {command}')


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


def _records(builder: Any, split: str) -> tuple[int, Iterator[dict[str, Any]]]:
  """How many records a split has, and these in order, read as they are asked for."""
  if _stored_as(builder) == 'tfrecord':
    import tensorflow_datasets as tfds

    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    records = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False, read_config=in_order))
    return builder.info.splits[split].num_examples, iter(records)
  source = builder.as_data_source(split=split)
  size = len(source)
  parts = (range(size)[start:start + _DECODED_AT_ONCE] for start in range(0, size, _DECODED_AT_ONCE))
  return size, itertools.chain.from_iterable(source.__getitems__(list(rows)) for rows in parts)


def _newest(root: pathlib.Path, name: str) -> pathlib.Path | None:
  """The directory of a data set's named or else highest version."""
  name, _, version = name.partition(':')
  found = [path.parent for path in (root / name).glob('*/dataset_info.json')]
  found = [path for path in found if re.fullmatch(r'\d+\.\d+\.\d+', path.name) and version in ('', path.name)]
  return max(found, key=lambda path: tuple(map(int, path.name.split('.'))), default=None)


def _prepared(roots: list[pathlib.Path]) -> set[str]:
  """Names of the data sets that lie there."""
  return {path.parent.parent.name for root in roots for path in root.glob('*/*/dataset_info.json')}


def _decode(
    name: str, size: int, records: Iterator[dict[str, Any]], image_shape: tuple[int, int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
  """All images and labels."""
  if not size:
    raise ValueError(f'There is no image in this split of data set {name!r}.')
  shape = None if image_shape is None else tuple(image_shape)
  images, labels = None, np.empty(size, np.int32)
  for row in range(size):
    record = _attempt(lambda: next(records), f'Data set {name!r}')
    image = record['image']
    if shape is None:
      shape = image.shape
    if image.shape != shape or image.dtype != np.uint8:
      wanted = 'asked for' if image_shape else 'what others of it have'
      raise ValueError(
          f'Data set {name!r} has an image of {image.dtype} {image.shape}, but uint8 {shape} is {wanted}.')
    if images is None:
      images = np.empty((size, *shape), np.uint8)
    images[row], labels[row] = image, record['label']
  return images, labels


def _attempt(read: Callable[[], Any], what: str) -> Any:
  """What `read` returns; whatever error TFDS has, in one line."""
  try:
    return read()
  except Exception as error:
    raise ValueError(f'{what} cannot be read: {" ".join(str(error).split())}') from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Within: TFDS does not advise on image decoders."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)
