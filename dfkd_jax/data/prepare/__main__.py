"""The command line of `dfkd_jax.prepare`."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from dfkd_jax import paths
from dfkd_jax.data import prepare

_OPTIONS = {
    'folder': {'name', 'classes', 'labels', 'masks', 'first_label'}, 'arrays': {'name'}}


class _Parser(argparse.ArgumentParser):
  """Raises where argparse would print its usage and exit."""

  def error(self, message: str) -> None:
    raise ValueError(f'{message}; see --help.')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = _Parser(prog='python -m dfkd_jax.prepare',
                   description='Writes a data set that TFDS reads, without TensorFlow.')
  add = parser.add_argument
  add('kind', help='mnist, fashion_mnist, kmnist, cifar10, cifar100, or the name of a data set of '
                   'your own; or folder or arrays')
  add('--source', required=True, help='directory of IDX files, binary archive of CIFAR, or .npz '
                                      'file; for folder: a folder of images, with a sub-folder for '
                                      'each class unless --labels or --masks is given')
  add('--data_dir', default=os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'))
  add('--splits', '--split', nargs='+', help='default: train test; for folder and arrays: test')
  add('--name', help='for folder and arrays: name of the data set; default: name of the source')
  add('--classes', help='for folder: file with one class name a line, in the order of the labels')
  add('--labels', help="for folder: file with lines 'filename label', if there are no sub-folders")
  add('--masks', help='for folder: folder with the mask of each image under the same name, grey or '
                      'palette, with one class index a pixel')
  add('--first_label', type=int, help='with --masks: value of the first class in masks; lower '
                                      'values are unlabelled; default: 0')
  try:
    flags = parser.parse_args(argv)
    name, splits, class_names = _read_source(flags)
    folder = prepare.write(name, splits, flags.data_dir, class_names=class_names)
  except (ValueError, OSError) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  counts = ', '.join(f'{len(images)} {split}' for split, (images, *_) in splits.items())
  print(f'Wrote {counts} images to {folder}')
  return 0


def _read_source(
    flags: argparse.Namespace) -> tuple[str, Mapping[str, prepare.Split], Sequence[str] | None]:
  """Returns the name, the splits and the class names of a data set."""
  for option in sorted(_OPTIONS['folder']):
    if option not in _OPTIONS.get(flags.kind, ()) and getattr(flags, option) is not None:
      raise ValueError(f'--{option} is not for {flags.kind!r}.')
  if flags.kind not in _OPTIONS:
    return flags.kind, *prepare.read(flags.kind, flags.source, flags.splits or ['train', 'test'])
  split, *more = flags.splits or ['test']
  if more:
    raise ValueError(f'--split is {" ".join(flags.splits)}, must be one.')
  name = flags.name or paths.expand_path(flags.source, 'source').absolute().stem.lower()
  if flags.kind == 'arrays':
    return name, *prepare.read_arrays(name, flags.source, split)
  if flags.masks is None and flags.first_label is not None:
    raise ValueError('--first_label needs --masks.')
  if flags.masks is not None and flags.labels is not None:
    raise ValueError('--masks and --labels exclude each other.')
  if flags.masks is not None:
    pairs, classes = prepare.read_pairs(
        flags.source, flags.masks, classes=flags.classes, first_label=flags.first_label or 0)
    return name, {split: pairs}, classes
  photos, classes = prepare.read_folder(flags.source, classes=flags.classes, labels=flags.labels)
  return name, {split: photos}, classes


if __name__ == '__main__':
  sys.exit(main())
