"""Reads folders of photos with one sub-folder for each class, a list of labels, or masks."""

import os
import pathlib

import numpy as np

from dfkd_jax import messages
from dfkd_jax.data.images import UNLABELLED, check_pair, map_in_threads
from dfkd_jax.data.prepare.files import Files, MaskFiles
from dfkd_jax.data.prepare.writer import Split
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
  source = _find_folder(source)
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


def read_pairs(source: str | os.PathLike, masks: str | os.PathLike, *,
               classes: str | os.PathLike | None = None, first_label: int = 0,
               ) -> tuple[Split, list[str] | None]:
  """Returns a split of photos with masks and the column `file_name`, and K class names or None.

  An image and its mask have equal names, without suffix, in equal sub-folders. They may have any
  size; `write` reads them. Raises ValueError if an image or a mask is alone, if the two differ in
  size, or if a mask has no class indices.

  Args:
    source: A folder of images, which may have sub-folders. Images are ordered by path.
    masks: A folder of masks: grey or palette images with one class index a pixel.
    classes: A file with one class name a line, in the order of the labels. None: no names.
    first_label: The value v of a mask is class v - first_label. Values below it, and 255, are
      unlabelled.
  """
  if not 0 <= first_label < UNLABELLED:
    raise ValueError(f'first_label is {first_label}, must be in 0..{UNLABELLED - 1}.')
  images, labels = (_find_by_name(_find_folder(folder)) for folder in (source, masks))
  for paths, others, kind, missing, folder in (
      (images, labels, 'Image', 'mask', masks), (labels, images, 'Mask', 'image', source)):
    if alone := [path for name, path in paths.items() if name not in others]:
      raise ValueError(f'{kind} {alone[0]!r} has no {missing} of the same name in {str(folder)!r}.')
  pairs = [(path, labels[name]) for name, path in images.items()]
  for _ in map_in_threads(lambda pair: check_pair(*pair), pairs):
    pass
  images, labels = zip(*pairs, strict=True)
  columns = {'file_name': np.array([os.path.basename(path) for path in images])}
  names = classes and _read_lines(classes)
  return Split(Files(images), MaskFiles(labels, first_label), columns), names


def _find_folder(folder: str | os.PathLike) -> pathlib.Path:
  folder = expand_path(folder, 'source')
  if not folder.is_dir():
    raise ValueError(f'There is no folder {str(folder)!r}.')
  return folder


def _find_by_name(folder: pathlib.Path) -> dict[str, str]:
  """Returns the paths of images in a folder, by their path in it without suffix."""
  paths = {}
  for path in _find_images(folder):
    name = os.path.splitext(os.path.relpath(path, folder))[0]
    if name in paths:
      raise ValueError(f'{paths[name]!r} and {path!r} have the same name, must be one file.')
    paths[name] = path
  if not paths:
    raise ValueError(f'There is no image in {str(folder)!r}.')
  return paths


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
