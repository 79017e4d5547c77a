"""The adversarial factor of CuDFKD, by a loop as its published code has it."""

import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.synth import schedules


@pytest.mark.parametrize(('first', 'slope', 'begin', 'end', 'every', 'epochs'), [
    (0.5, 0.05, 62, 187, 40, 250), (0.0, 0.35, 80, 320, 40, 400), (1.0, 0.0, 3, 5, 2, 9),
    (0.2, 0.1, 4, 4, 1, 8), (0.2, 0.1, 4, 5, 3, 8)])
def test_ramp_is_the_published_loop(first, slope, begin, end, every, epochs):
  factor, expected = first, []
  for epoch in range(epochs):
    expected += [factor] * every
    if begin < epoch < end:  # At the end of the epoch.
      factor += slope
  found = schedules.ramp(first, slope, begin, end, every)(jnp.arange(epochs * every))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(init_value=-0.1), 'init_value of a ramp is -0.1, must be at least 0'),
    (dict(slope=float('nan')), 'slope of a ramp is nan'),
    (dict(end=3), 'end of a ramp is 3, must be at least 4'),
    (dict(every=0), 'every of a ramp is 0, must be at least 1')])
def test_bad_numbers_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    schedules.ramp(**{'init_value': 0.0, 'slope': 0.1, 'begin': 4, 'end': 9, **changes})
