"""What config files share: all fields, the methods, and the arguments after the colon."""

from ml_collections import config_dict

from dfkd_jax import messages
from dfkd_jax.config.fields import base as base


def averaged() -> dict:
  """Fields of a method whose generator may have a moving average; None: it has not, and a share of a half."""
  return dict(ema_decay=config_dict.placeholder(float), ema_share=config_dict.placeholder(float))


def pick(arguments: str, **choices: tuple[str, ...]) -> dict[str, str]:
  """Sorts comma-separated arguments into groups; the first of a group is its default.

  Args:
    arguments: Such as 'fast_dfkd,fast5,wrn40_2-wrn16_1', in any order; each may be left out.
    **choices: What is allowed, by group; None where a group has no default.

  Raises:
    ValueError: An argument that no group has, or two of one group.
  """
  picked = {}
  for argument in filter(None, arguments.split(',')):
    groups = [group for group, allowed in choices.items() if argument in allowed]
    known = [choice for allowed in choices.values() for choice in allowed if choice]
    if not groups:
      messages.check_choice(argument, known, 'config argument')
    if groups[0] in picked:
      raise ValueError(f'Config arguments {picked[groups[0]]!r} and {argument!r} exclude each other.')
    picked[groups[0]] = argument
  return {group: allowed[0] for group, allowed in choices.items()} | picked
