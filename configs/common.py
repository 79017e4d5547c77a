"""What config files share: all fields, the methods, and the arguments after the colon."""

import importlib
import pathlib
import pkgutil
import types

from ml_collections import config_dict

from dfkd_jax import messages
from dfkd_jax.config.fields import base as base


def averaged() -> dict:
  """Fields of a moving average of the generator; None: no average, and a share of a half."""
  return dict(ema_decay=config_dict.placeholder(float), ema_share=config_dict.placeholder(float))


def methods(scale: str) -> dict[str, types.ModuleType]:
  """Returns the files of configs/methods with a function `scale`, by name; the default is first."""
  folder = str(pathlib.Path(__file__).parent / 'methods')
  names = sorted((info.name for info in pkgutil.iter_modules([folder])),
                 key=lambda name: (name != 'fast_dfkd', name))
  modules = {name: importlib.import_module(f'configs.methods.{name}') for name in names}
  return {name: module for name, module in modules.items() if hasattr(module, scale)}


def pick(arguments: str, **choices: tuple[str | None, ...]) -> dict[str, str | None]:
  """Sorts comma-separated arguments into groups; the first of a group is its default.

  Args:
    arguments: Such as 'fast_dfkd,fast5,wrn40_2-wrn16_1', in any order; each may be left out.
    **choices: The allowed arguments of each group; the first is None if there is no default.

  Raises:
    ValueError: No group has the argument, or two are of one group.
  """
  picked = {}
  for argument in filter(None, arguments.split(',')):
    groups = [group for group, allowed in choices.items() if argument in allowed]
    known = [choice for allowed in choices.values() for choice in allowed if choice]
    if not groups:
      messages.check_choice(argument, known, 'config argument')
    if groups[0] in picked:
      raise ValueError(
          f'Config arguments {picked[groups[0]]!r} and {argument!r} exclude each other.')
    picked[groups[0]] = argument
  return {group: allowed[0] for group, allowed in choices.items()} | picked
