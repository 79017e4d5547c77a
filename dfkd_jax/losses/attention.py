"""Where a network looks, as a loss between two."""

import jax.numpy as jnp
import optax

from dfkd_jax.types import Array


def attention_map(maps: Array) -> Array:
  """Mean of squares over channels, as a vector of norm 1 over pixels: [B, h, w, C] -> [B, h w]."""
  energy = jnp.square(maps).mean(-1).reshape(maps.shape[0], -1)
  return energy / optax.safe_norm(energy, 1e-12, axis=-1, keepdims=True)


def attention_transfer(student_maps: tuple[Array, ...], teacher_maps: tuple[Array, ...]) -> Array:
  """Distance of the two networks' attention, summed over stages.

  sum_l |a_l(teacher) - a_l(student)| with a_l of `attention_map`: Zagoruyko and Komodakis (arXiv:1612.03928), as in
  ZSKT (arXiv:1905.09768, equation 2; recalled), where it counts 250 times beside the divergence.

  Args:
    student_maps: [B, h, w, C] after each stage; channels may differ from the teacher's, pixels may not.
    teacher_maps: As many.

  Returns:
    [B], from 0 to 2 for each stage.

  Raises:
    ValueError: Stages or pixels differ, or there are none.
  """
  sizes = [tuple(maps.shape[1:3] for maps in of) for of in (student_maps, teacher_maps)]
  if sizes[0] != sizes[1] or not sizes[0]:
    raise ValueError(f'Stages of the student have {sizes[0]} pixels, must be those of the teacher, {sizes[1]}.')
  pairs = zip(student_maps, teacher_maps, strict=True)
  return sum(optax.safe_norm(attention_map(a) - attention_map(b), 0.0, axis=-1) for a, b in pairs)
