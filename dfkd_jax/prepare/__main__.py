"""The command line of `dfkd_jax.prepare`."""

import argparse
import os
import sys
from collections.abc import Sequence

from dfkd_jax import prepare


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(
      prog='python -m dfkd_jax.prepare', description='Writes a data set that TFDS reads, without TensorFlow.')
  parser.add_argument('name', help='mnist, fashion_mnist, kmnist, cifar10, cifar100 or a name of your own')
  parser.add_argument('--source', required=True, help='directory of IDX files, archive of CIFAR (binary) or .npz')
  parser.add_argument('--data_dir', default=os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'))
  parser.add_argument('--splits', nargs='+', default=['train', 'test'])
  flags = parser.parse_args(argv)
  try:
    splits, class_names = prepare.read(flags.name, flags.source, flags.splits)
    target = prepare.write(flags.name, splits, flags.data_dir, class_names=class_names)
  except (ValueError, OSError) as error:
    print(f'{parser.prog}: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  print(f'Wrote {", ".join(f"{len(split[0])} {key}" for key, split in splits.items())} images to {target}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
