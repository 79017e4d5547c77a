"""Runs a config; `python main.py --help` explains all."""

import sys

from dfkd_jax import cli
from dfkd_jax.cli import load, main, override

__all__ = ['load', 'main', 'override']

if __name__ == '__main__':
  cli.silence_libraries()
  sys.exit(main(sys.argv))
