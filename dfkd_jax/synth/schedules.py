"""Factors that change in the course of a run, as optax schedules of the method's calls."""

import jax.numpy as jnp
import optax

from dfkd_jax.messages import FieldError


def ramp(init_value: float, slope: float, begin: int, end: int, every: int = 1) -> optax.Schedule:
  """In epoch e: init_value + slope * clip(e - 1 - begin, 0, end - 1 - begin).

  CuDFKD's adversarial factor (arXiv:2208.13648, its code): the slope is added at the end of each
  epoch strictly between `begin` and `end`, so it is last raised for epoch `end`.

  An epoch has `every` calls. Raises a FieldError if a number is below its least value.
  """
  for name, value, least in (('init_value', init_value, 0), ('slope', slope, 0),
                             ('begin', begin, 0), ('end', end, begin), ('every', every, 1)):
    if not value >= least:
      raise FieldError(
          f'adversarial.{name}', f'{name} of a ramp is {value}, must be at least {least}.')
  last = max(end - 1 - begin, 0)
  return lambda step: init_value + slope * jnp.clip(step // every - 1 - begin, 0, last)
