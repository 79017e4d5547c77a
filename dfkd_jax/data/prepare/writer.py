"""Writes data sets in the array_record format of TFDS."""

import contextlib
import itertools
import os
import pathlib
import re
import shutil
import types
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax import paths
from dfkd_jax.data.prepare import records
from dfkd_jax.data.prepare.image_files import Files

_MOST_CLASSES = 2**20  # Without class names. Larger labels are a mistake and would fill the memory.


class Split(NamedTuple):
  """A split to write: images, labels and further columns, each of N items."""

  images: np.ndarray | Files  # uint8 [N, H, W, C] with C of 1, 3 or 4
  labels: np.ndarray  # int [N], from 0
  columns: Mapping[str, Any] = types.MappingProxyType({})  # Of integers or strings [N].


class _Definition(NamedTuple):
  """The definition of a data set in TFDS, which new files must match."""

  version: str
  image_shape: tuple[int | None, int | None, int] | None = None
  class_names: Sequence[str] | None = None


_DEFINITIONS = {
    'mnist': _Definition('3.0.1', (28, 28, 1), list('0123456789')),
    'kmnist': _Definition('3.0.1', (28, 28, 1), list('0123456789')),
    'fashion_mnist': _Definition('3.0.1', (28, 28, 1), [
        'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
        'Ankle boot']),
    'cifar10': _Definition('3.0.2', (32, 32, 3), [
        'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']),
    'cifar100': _Definition('3.0.2', (32, 32, 3), [str(i) for i in range(100)]),
    'imagenet2012': _Definition('5.1.0', (None, None, 3)),
}


def write(
    name: str, splits: Mapping[str, Split], data_dir: str | os.PathLike, *,
    class_names: Sequence[str] | None = None,
) -> pathlib.Path:
  """Writes splits to `<data_dir>/<name>/<version>/`, or adds them if the data set exists.

  After an error or an interruption, no part of the new splits counts.

  Args:
    name: Name in snake_case. The version is TFDS' version of this data set, or 1.0.0.
    splits: `Split`s by name, such as `train` and `test`. Plain tuples are accepted.
    data_dir: Folder of data sets, created if missing.
    class_names: K names in the order of the labels. None takes the names of the existing data
      set, of TFDS' definition, or numbers.

  Returns:
    The directory of the data set.

  Raises:
    ValueError: An array has a wrong shape or dtype, or differs from TFDS' definition or the
      existing splits. Or a split exists already, or a file is not an image.
  """
  for identifier in (name, *splits):
    if not re.fullmatch(r'[a-z][a-z0-9_]*', identifier):
      raise ValueError(f'Names must be in snake_case, got {identifier!r}.')
  splits = {key: _check_split(f'split {key!r} of {name!r}', *split)
            for key, split in splits.items()}
  definition = _DEFINITIONS.get(name, _Definition('1.0.0'))
  data_dir = paths.expand_path(data_dir, 'data_dir').absolute()
  folder = data_dir / name / definition.version
  info = records.read_info(folder, name, splits)
  _check_consistency(name, splits, definition, info)
  class_names = _choose_class_names(name, splits, class_names, definition, info)
  missing = [path for path in (folder.parent, data_dir, *data_dir.parents) if not path.exists()]
  unfinished = data_dir / f'.{name}-{definition.version}.incomplete-{uuid.uuid4().hex[:8]}'
  try:
    unfinished.mkdir(parents=True)
    records.write_folder(unfinished, name, definition.version, splits, class_names, info)
    if info:
      records.merge(unfinished, folder, info)
    else:
      folder.parent.mkdir(exist_ok=True)
      unfinished.rename(folder)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
    for path in missing:  # Removes new folders that are still empty.
      with contextlib.suppress(OSError):
        path.rmdir()
  return folder


def _check_split(
    title: str, images: Any, labels: Any, columns: Mapping[str, Any] | None = None
) -> Split:
  """Returns the split as arrays, if TFDS can read them."""
  images = images if isinstance(images, Files) else np.asarray(images)
  labels = np.asarray(labels)
  columns = {key: np.asarray(column) for key, column in (columns or {}).items()}
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
    raise ValueError(f'Images of {title} must be uint8 [N, H, W, 1, 3 or 4], '
                     f'got {images.dtype} {images.shape}.')
  if labels.dtype.kind not in 'iu' or labels.shape != images.shape[:1] or not labels.size:
    raise ValueError(f'Labels of {title} must be {len(images)} > 0 integers, '
                     f'got {labels.dtype} {labels.shape}.')
  for key, column in columns.items():
    if len(column) != len(images):
      raise ValueError(f'Column {key!r} of {title} has {len(column)} of {len(images)} values.')
  return Split(images, labels, columns)


def _check_consistency(
    name: str, splits: Mapping[str, Split], definition: _Definition, info: Any
) -> None:
  """Raises ValueError if splits differ from each other, existing splits, or the definition."""
  image_shape = definition.image_shape or (info and info.features['image'].shape)
  columns = info and records.stored_columns(info)
  for key, split in splits.items():
    image_shape = image_shape or split.images.shape[1:]
    if image_shape != split.images.shape[1:]:
      raise ValueError(f'Images of split {key!r} of {name!r} must be {image_shape} each, '
                       f'got {split.images.shape[1:]}.')
    new = {'label': False} | {key: a.dtype.kind == 'U' for key, a in split.columns.items()}
    columns = columns or new
    if new != columns:
      raise ValueError(f'Columns of split {key!r} of {name!r} must be {sorted(columns)} '
                       f'as in other splits, got {sorted(new)}.')


def _choose_class_names(
    name: str, splits: Mapping[str, Split], class_names: Sequence[str] | None,
    definition: _Definition, info: Any,
) -> list[str]:
  """Returns the given, existing or defined class names, or numbers."""
  defined, stored = definition.class_names, info and list(info.features['label'].names)
  lowest = min(int(split.labels.min()) for split in splits.values())
  highest = max(int(split.labels.max()) for split in splits.values())
  names = next((names for names in (class_names, stored, defined) if names is not None), None)
  num_classes = _MOST_CLASSES if names is None else len(names)
  if lowest < 0 or highest >= num_classes:
    raise ValueError(f'Labels of {name!r} are {lowest}..{highest}, must be 0..{num_classes - 1}.')
  names = [str(item) for item in names or range(1 + highest)]
  if defined and len(names) != len(defined):
    raise ValueError(f'{name!r} has {len(defined)} classes, got {len(names)} class names.')
  if len(set(names)) < len(names):
    raise ValueError(f'{name!r} has class {max(names, key=names.count)!r} twice.')
  for i, (old, new) in enumerate(itertools.zip_longest(stored or names, names)):
    if old != new:
      raise ValueError(f'Class {i} of {name!r} is {new!r}, must be {old!r} as in other splits.')
  return names
