"""Factors that change in the course of a run, as Optax schedules of the method's calls."""

import jax.numpy as jnp
import optax


def ramp(init_value: float, slope: float, begin: int, end: int, every: int = 1) -> optax.Schedule:
  """In epoch e init_value + slope * clip(e - 1 - begin, 0, end - 1 - begin).

  CuDFKD's adversarial factor (arXiv:2208.13648, its code): the slope is added at the end of each epoch strictly
  between `begin` and `end`, so that it is last raised for epoch `end`.

  Args:
    init_value: At first, at least 0.
    slope: What an epoch adds, at least 0.
    begin: Epoch, from 0.
    end: Epoch, not before `begin`.
    every: Calls in an epoch.

  Raises:
    ValueError: Names the first number that is out of its range.
  """
  for name, value, least in (('init_value', init_value, 0), ('slope', slope, 0), ('begin', begin, 0),
                             ('end', end, begin), ('every', every, 1)):
    if not value >= least:
      raise ValueError(f'{name} of a ramp is {value}, must be at least {least}.')
  return lambda step: init_value + slope * jnp.clip(step // every - 1 - begin, 0, max(end - 1 - begin, 0))
