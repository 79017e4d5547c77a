"""Reads folders of photos: one sub-folder for each class, or one folder with a list of labels."""

import os
import pathlib

import numpy as np

from dfkd_jax import messages
from dfkd_jax.data.prepare.writer import Files, Split
from dfkd_jax.paths import expand_path

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.pgm', '.tif', '.tiff', '.webp')


def read_folder(source: str | os.PathLike, *, classes: str | os.PathLike | None = None,
                labels: str | os.PathLike | None = None) -> tuple[Split, list[str]]:
  """Returns a split of photos with labels int [N] and the column `file_name`, and K class names.

  Photos may have any size; `write` reads them. Raises ValueError if a file is missing, a class has
  no image, or an image has no known label.

  Args:
    source: A folder with a sub-folder for each class, which may have sub-folders. Images are
      ordered by path. With `labels`, a folder of images.
    classes: A file with one class name a line, in the order of the labels, such as ImageNet's
      wnids. Classes may have no image. None takes the names of the sub-folders, or the names in
      `labels`, sorted as text, which gives torchvision's labels. If all names in `labels` are
      numbers, they are the labels.
    labels: A file with lines 'filename label'; the rest of a line is ignored. A label is the name
      or the number of a class. The file names all images of the folder.
  """
  source = expand_path(source, 'source')
  if not source.is_dir():
    raise ValueError(f'There is no folder {str(source)!r}.')
  names = classes and _read_lines(classes)
  images = _read_classes(source) if labels is None else _read_list(source, labels)
  if not names and labels is not None and all(label.isdecimal() for label in images.values()):
    names = [str(i) for i in range(1 + max(map(int, images.values())))]
  names = names or sorted(set(images.values()))
  numbers = {} if labels is None else {str(i): i for i in range(len(names))}
  indices = numbers | {name: i for i, name in enumerate(names)}
  if unknown := [label for label in images.values() if label not in indices]:
    raise ValueError(f'Unknown label {unknown[0]!r}, must be one of the {len(names)} classes '
                     f'{names[0]!r} to {names[-1]!r}{" or their number" if labels else ""}.')
  columns = {'file_name': np.array([os.path.basename(path) for path in images])}
  labels = np.array([indices[label] for label in images.values()])
  return Split(Files(images), labels, columns), names


def _read_classes(source: pathlib.Path) -> dict[str, str]:
  """Returns the class of each image in sub-folders, by path."""
  folders = sorted(path for path in source.iterdir() if path.is_dir() and path.name[0] != '.')
  if not folders:
    raise ValueError(f'{str(source)!r} has no sub-folders for classes, and no labels are given.')
  images = {}
  for folder in folders:
    paths = _find_images(folder)
    if not paths:
      raise ValueError(f'Class {folder.name!r} is empty: there is no image in {str(folder)!r}.')
    images |= dict.fromkeys(paths, folder.name)
  return images


def _read_list(source: pathlib.Path, labels: str | os.PathLike) -> dict[str, str]:
  """Returns the label of each image in the lines of a file, by path."""
  images = {}
  for line in _read_lines(labels):
    name, label, *_ = *line.split(), None, None
    path = os.path.join(source, name)
    if label is None or path in images:
      raise ValueError(f"{str(labels)!r} has line {line!r}, must be 'filename label', once a file.")
    if not os.path.isfile(path):
      raise ValueError(f'{str(labels)!r} names {name!r}, which is not in {str(source)!r}.')
    images[path] = label
  for path in _find_images(source):
    if path not in images:
      raise ValueError(f'{str(labels)!r} does not name {path!r}.')
  return images


def _find_images(folder: pathlib.Path) -> list[str]:
  """Returns the sorted paths of visible files with an image's suffix, also in sub-folders."""
  return sorted(os.path.join(root, file) for root, _, files in os.walk(folder, followlinks=True)
                for file in files if file.lower().endswith(_SUFFIXES) and file[0] != '.')


def _read_lines(path: str | os.PathLike) -> list[str]:
  """Reads the lines of a file without the blank ones."""
  with messages.reporting_read_errors(repr(str(path))):
    text = expand_path(path, 'file').read_text(encoding='utf-8')
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if not lines:
    raise ValueError(f'{str(path)!r} has no line.')
  return lines
