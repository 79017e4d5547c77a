"""The command line of `dfkd_jax.prepare`."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from dfkd_jax import paths
from dfkd_jax.data import prepare

_OWN = ('folder', 'arrays')


class _Parser(argparse.ArgumentParser):
  """Raises where argparse would print its usage and exit."""

  def error(self, message: str) -> None:
    raise ValueError(f'{message}; see --help.')


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit status."""
  try:
    flags = _parser().parse_args(argv)
    name, splits, class_names = _read(flags)
    target = prepare.write(name, splits, flags.data_dir, class_names=class_names)
  except (ValueError, OSError) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  print(f'Wrote {", ".join(f"{len(split[0])} {key}" for key, split in splits.items())} images to {target}')
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
      prog='python -m dfkd_jax.prepare', description='Writes a data set that TFDS reads, without TensorFlow.')
  parser.add_argument('what', help='mnist, fashion_mnist, kmnist, cifar10, cifar100 or a name of your own; '
                                   'or folder or arrays, for images of your own')
  parser.add_argument('--source', required=True, help='directory of IDX files, archive of CIFAR (binary) or .npz; '
                                                      'for folder, one with a sub-folder for each class')
  parser.add_argument('--data_dir', default=os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'))
  parser.add_argument('--splits', '--split', nargs='+', help='train test; for folder and arrays, one: test')
  parser.add_argument('--name', help='for folder and arrays: of the data set; else as the source is called')
  parser.add_argument('--classes', help='for folder: a file with the name of a class a line, in the order of labels')
  parser.add_argument('--labels', help="for folder: a file with lines 'filename label', if there are no sub-folders")
  return parser


def _read(flags: argparse.Namespace) -> tuple[str, Mapping[str, prepare.Split], Sequence[str] | None]:
  """Name, splits and class names.

  Raises:
    ValueError: What is asked for does not fit together, or cannot be read.
  """
  allowed = {'folder': {'name', 'classes', 'labels'}, 'arrays': {'name'}}.get(flags.what, set())
  for option in ('name', 'classes', 'labels'):
    if option not in allowed and getattr(flags, option) is not None:
      raise ValueError(f'--{option} is not for {flags.what!r}.')
  if flags.what not in _OWN:
    return flags.what, *prepare.read(flags.what, flags.source, flags.splits or ['train', 'test'])
  splits = flags.splits or ['test']
  if len(splits) != 1:
    raise ValueError(f'--split is {" ".join(splits)}, must be one.')
  name = flags.name or paths.expand_path(flags.source, 'source').absolute().stem.lower()
  if flags.what == 'arrays':
    return name, *prepare.read_arrays(name, flags.source, splits[0])
  of_split, class_names = prepare.read_folder(flags.source, classes=flags.classes, labels=flags.labels)
  return name, {splits[0]: of_split}, class_names


if __name__ == '__main__':
  sys.exit(main())
