"""Runs a config; python main.py --help explains all."""

import sys

from dfkd_jax.cli import main

if __name__ == '__main__':
  sys.exit(main(sys.argv))
