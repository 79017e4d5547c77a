"""`python -m dfkd_jax.prepare` is short for `python -m dfkd_jax.data.prepare`."""

import sys

from dfkd_jax.data.prepare.__main__ import main

if __name__ == '__main__':
  sys.exit(main())
