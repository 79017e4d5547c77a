"""Folders of photos: one sub-folder a class, or one folder and a list of labels."""

import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from dfkd_jax.data.prepare import image_files
from dfkd_jax.data.prepare.writer import Split
from dfkd_jax.paths import expand_path


def read_folder(
    source: str | os.PathLike, *, classes: str | os.PathLike | None = None, labels: str | os.PathLike | None = None
) -> tuple[Split, list[str]]:
  """Photos of any size, with their labels and the column `file_name`; they are read when `write` writes them.

  Args:
    source: A folder with a sub-folder for each class, in which images may lie
      deeper; in the order of their paths. With `labels`, a folder of images.
    classes: A file with the name of a class a line, in the order of their labels:
      for ImageNet its wnids. Some may have no image here. None: the names of
      sub-folders as text is sorted, which gives torchvision's labels, those in
      `labels` likewise, or numbers if these are all numbers.
    labels: A file with lines 'filename label', in this order, with the name or number
      of a class; what follows in a line is passed over. It names all images of the folder.

  Returns:
    (Files, int [N], {'file_name': [N]}), as `write` takes a split, and K class names.

  Raises:
    ValueError: A folder or file is not there, a class has no image, a label is
      unknown, or an image is not labelled.
  """
  source = expand_path(source, 'source')
  if not source.is_dir():
    raise ValueError(f'There is no folder {str(source)!r}.')
  names = None if classes is None else _lines(classes)
  if names is not None and len(set(names)) != len(names):
    raise ValueError(f'{str(classes)!r} has class {max(names, key=names.count)!r} twice.')
  found = _by_folder(source) if labels is None else _by_list(source, labels)
  names = names or _sorted({label for _, label in found}, numbers=labels is not None)
  index = {name: i for i, name in enumerate(names)}
  if labels is not None:
    index = {str(i): i for i in range(len(names))} | index
  if unknown := next((label for _, label in found if label not in index), None):
    raise ValueError(f'Unknown label {unknown!r}, must be one of the {len(names)} classes {names[0]!r} to '
                     f'{names[-1]!r}{"" if labels is None else " or their number"}.')
  paths = [path for path, _ in found]
  column = {'file_name': np.array([os.path.basename(path) for path in paths])}
  return (image_files.Files(paths), np.array([index[label] for _, label in found]), column), names


def _sorted(names: set[str], numbers: bool) -> list[str]:
  """Names in order; all from 0 on if they are, and may be, numbers."""
  if numbers and all(re.fullmatch(r'\d+', name, re.ASCII) for name in names):
    return [str(i) for i in range(1 + max(map(int, names)))]
  return sorted(names)


def _by_folder(source: pathlib.Path) -> list[tuple[str, str]]:
  """(path, class) of all images in sub-folders."""
  found = []
  folders = sorted(path for path in source.iterdir() if path.is_dir() and path.name[0] != '.')
  if not folders:
    raise ValueError(f'{str(source)!r} has no sub-folders, must have one for each class (or labels in a list).')
  for folder in folders:
    inside = sorted(_images(folder))
    if not inside:
      raise ValueError(f'Class {folder.name!r} is empty: there is no image in {str(folder)!r}.')
    found += [(path, folder.name) for path in inside]
  return found


def _by_list(source: pathlib.Path, labels: str | os.PathLike) -> list[tuple[str, str]]:
  """(path, label) by the lines of a file."""
  found = {}
  for line in _lines(labels):
    name, label, *_ = *line.split(), None, None
    path = os.path.join(source, name)
    if label is None or path in found:
      raise ValueError(f"{str(labels)!r} has line {line!r}, must be 'filename label' and have each file once.")
    if not os.path.isfile(path):
      raise ValueError(f'There is no {name!r}, which {str(labels)!r} names, in {str(source)!r}.')
    found[path] = label
  if unnamed := sorted(set(_images(source)) - set(found)):
    raise ValueError(f'{str(labels)!r} does not name {unnamed[0]!r}.')
  return list(found.items())


def _images(folder: pathlib.Path) -> Iterator[str]:
  """Paths of the files in a folder, however deep, that are images by their names."""
  for root, _, files in os.walk(folder, followlinks=True):
    for file in files:
      if file.lower().endswith(image_files.SUFFIXES) and file[0] != '.':
        yield os.path.join(root, file)


def _lines(path: str | os.PathLike) -> Sequence[str]:
  """A file's lines, without blank ones."""
  try:
    text = expand_path(path, 'file').read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f'{str(path)!r} cannot be read: {error}') from error
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if not lines:
    raise ValueError(f'{str(path)!r} has no line.')
  return lines
