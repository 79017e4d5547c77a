r"""Tables of numbers for `python -m dfkd_jax.spline`: values of its flags.

  python -m dfkd_jax.spline abalone.data --config=configs/regression.py:abalone

Arguments: `diabetes`, which scikit-learn ships; `abalone` and `wine_quality`, the data sets of
arXiv:2102.06554, whose files are at https://archive.ics.uci.edu/dataset/1/abalone (abalone.data)
and https://archive.ics.uci.edu/dataset/186/wine+quality (winequality-red.csv, -white.csv).
Other flags have the command's defaults. Flags on the command line come before these values.
"""

from ml_collections import config_dict

from configs import common

TABLES = {
    'diabetes': dict(),
    'abalone': dict(
        names=('sex', 'length', 'diameter', 'height', 'whole weight', 'shucked weight',
               'viscera weight', 'shell weight', 'rings'), drop=('sex',), target='rings'),
    'wine_quality': dict(target='quality')}


def get_config(arguments: str = ''):
  picked = common.pick(arguments, table=tuple(TABLES))
  return config_dict.ConfigDict(TABLES[picked['table']])
