"""Reads folders of photos: one sub-folder for each class, or one folder with a list of labels."""

import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from dfkd_jax.data.errors import reporting_read_errors
from dfkd_jax.data.prepare import image_files
from dfkd_jax.data.prepare.writer import Split
from dfkd_jax.paths import expand_path


def read_folder(
    source: str | os.PathLike, *, classes: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
) -> tuple[Split, list[str]]:
  """Finds photos of any size and their labels. `write` reads the photos later.

  Args:
    source: A folder with a sub-folder for each class, which may have sub-folders. Images are
      ordered by path. With `labels`, a folder of images.
    classes: A file with one class name a line, in the order of the labels, such as ImageNet's
      wnids. Classes may have no image. None takes the names of the sub-folders, or the names in
      `labels`, sorted as text, which gives torchvision's labels. If all names in `labels` are
      numbers, they are the labels.
    labels: A file with lines 'filename label'; the rest of a line is ignored. A label is the name
      or the number of a class. The file names all images of the folder.

  Returns:
    A split with `Files`, labels int [N] and the column `file_name`, and K class names.

  Raises:
    ValueError: A folder or file is missing, a class has no image, a label is unknown, or an image
      has no label.
  """
  source = expand_path(source, 'source')
  if not source.is_dir():
    raise ValueError(f'There is no folder {str(source)!r}.')
  names = classes and _read_lines(classes)
  images = _by_folder(source) if labels is None else _by_list(source, labels)
  names = names or _class_names({label for _, label in images}, numbers=labels is not None)
  indices = {name: i for i, name in enumerate(names)}
  if labels is not None:
    indices = {str(i): i for i in range(len(names))} | indices
  for _, label in images:
    if label not in indices:
      raise ValueError(f'Unknown label {label!r}, must be one of the {len(names)} classes '
                       f'{names[0]!r} to {names[-1]!r}{" or their number" if labels else ""}.')
  paths = [path for path, _ in images]
  columns = {'file_name': np.array([os.path.basename(path) for path in paths])}
  indices = np.array([indices[label] for _, label in images])
  return Split(image_files.Files(paths), indices, columns), names


def _class_names(labels: set[str], numbers: bool) -> list[str]:
  """Returns class names in order: 0, 1, ... if labels may be numbers and all are."""
  if numbers and all(re.fullmatch(r'\d+', label, re.ASCII) for label in labels):
    return [str(i) for i in range(1 + max(map(int, labels)))]
  return sorted(labels)


def _by_folder(source: pathlib.Path) -> list[tuple[str, str]]:
  """Returns (path, class) of all images in sub-folders."""
  folders = sorted(path for path in source.iterdir() if path.is_dir() and path.name[0] != '.')
  if not folders:
    raise ValueError(f'{str(source)!r} has no sub-folders for classes, and no labels are given.')
  images = []
  for folder in folders:
    paths = sorted(_find_images(folder))
    if not paths:
      raise ValueError(f'Class {folder.name!r} is empty: there is no image in {str(folder)!r}.')
    images += [(path, folder.name) for path in paths]
  return images


def _by_list(source: pathlib.Path, labels: str | os.PathLike) -> list[tuple[str, str]]:
  """Returns (path, label) for the lines of a file."""
  images = {}
  for line in _read_lines(labels):
    name, label, *_ = *line.split(), None, None
    path = os.path.join(source, name)
    if label is None or path in images:
      raise ValueError(f"{str(labels)!r} has line {line!r}, must be 'filename label', once a file.")
    if not os.path.isfile(path):
      raise ValueError(f'{str(labels)!r} names {name!r}, which is not in {str(source)!r}.')
    images[path] = label
  if missing := sorted(set(_find_images(source)) - set(images)):
    raise ValueError(f'{str(labels)!r} does not name {missing[0]!r}.')
  return list(images.items())


def _find_images(folder: pathlib.Path) -> Iterator[str]:
  """Yields the paths of all files in a folder and its sub-folders that have an image's suffix."""
  for root, _, files in os.walk(folder, followlinks=True):
    for file in files:
      if file.lower().endswith(image_files.SUFFIXES) and file[0] != '.':
        yield os.path.join(root, file)


def _read_lines(path: str | os.PathLike) -> Sequence[str]:
  """Reads the lines of a file without the blank ones."""
  with reporting_read_errors(repr(str(path))):
    text = expand_path(path, 'file').read_text(encoding='utf-8')
  if lines := [line.strip() for line in text.splitlines() if line.strip()]:
    return lines
  raise ValueError(f'{str(path)!r} has no line.')
