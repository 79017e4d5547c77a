"""Runs a config: python main.py --config=configs/cifar10.py:fast_dfkd --workdir=runs/fast5.

Without arguments: the embedded quick start, configs/default.py.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file('config', 'configs/default.py', 'What to run.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where results go; default: runs/ and the name of the config.')


def main(argv: list[str]) -> None:
  """Runs the config that the flags name; a bad one costs one line and status 2."""
  del argv
  logging.set_verbosity(logging.WARNING)
  from dfkd_jax import train  # Flags are parsed before the seconds that this import takes.

  try:
    train.run(_CONFIG.value, _WORKDIR.value or 'runs/default')
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  app.run(main)
