"""A data set that is prepared already, to which further splits are added."""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any


def find(target: pathlib.Path, name: str, splits: Iterable[str]) -> Any:
  """What TFDS knows of the data set in a folder, None if there is none.

  Raises:
    ValueError: It cannot take these splits: has one of them, is stored in another form, or cannot be read.
  """
  if not target.exists():
    return None
  import tensorflow_datasets as tfds

  try:
    info = tfds.builder_from_directory(os.fspath(target)).info
    there, form = set(info.splits), getattr(info.file_format, 'value', None)
  except Exception as error:
    raise ValueError(f'{str(target)!r} is there already, and no data set that can be read: remove it.') from error
  if taken := sorted(there & set(splits)):
    raise ValueError(f'Data set {name!r} has split {taken[0]!r} already in {str(target)!r}: '
                     'remove that directory to write it anew.')
  if form != 'array_record':
    raise ValueError(f'Data set {name!r} in {str(target)!r} is stored as {form}, must be array_record to be added to.')
  return info


def check_names(info: Any, name: str, class_names: Sequence[str]) -> None:
  """Raises ValueError unless the classes are those that are there."""
  there, here = list(info.features['label'].names), [str(each) for each in class_names]
  if there != here:
    differ = next((pair for pair in zip(there, here, strict=False) if pair[0] != pair[1]), (len(there), len(here)))
    raise ValueError(f'Data set {name!r} is there with other classes: {differ[0]!r} there is {differ[1]!r} here.')


def is_text(info: Any) -> dict[str, bool]:
  """Of all columns but the images."""
  import tensorflow_datasets as tfds

  return {key: isinstance(feature, tfds.features.Text) for key, feature in info.features.items() if key != 'image'}


def records(info: Any) -> list[str]:
  """Names of the files that hold them."""
  return [file for split in info.splits.values() for file in split.filenames]


def merge(folder: pathlib.Path, target: pathlib.Path, info: Any) -> None:
  """Moves new records, then what says that they are there, from one folder to the other."""
  old = set(records(info))
  for path in sorted(folder.iterdir(), key=lambda path: path.name == 'dataset_info.json'):
    if path.name not in old:
      path.replace(target / path.name)
