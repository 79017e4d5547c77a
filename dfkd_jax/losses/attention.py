"""Attention transfer: compares where two networks look."""

import jax.numpy as jnp
import optax

from dfkd_jax.types import Array


def attention_map(maps: Array) -> Array:
  """Mean square over channels, normalized over pixels: [B, h, w, C] -> [B, h w]."""
  energy = jnp.square(maps).mean(-1).reshape(maps.shape[0], -1)
  return energy / optax.safe_norm(energy, 1e-12, axis=-1, keepdims=True)


def attention_transfer(student_maps: tuple[Array, ...], teacher_maps: tuple[Array, ...]) -> Array:
  """Distance between the attention maps of two networks, summed over stages: [B].

  sum_l |a_l(teacher) - a_l(student)| with a_l of `attention_map`, from 0 to 2 for each stage:
  Zagoruyko and Komodakis (arXiv:1612.03928). ZSKT (arXiv:1905.09768, equation 2; recalled) adds
  it to the divergence, with a factor of 250.

  Both have maps [B, h, w, C] after each stage. Channels may differ. Raises a ValueError if pixels
  or the number of stages differ, or there are none.
  """
  student, teacher = ([stage.shape[1:3] for stage in maps] for maps in (student_maps, teacher_maps))
  if student != teacher or not student:
    raise ValueError(
        f'Stages of the student have {student} pixels, must be {teacher}, as in the teacher.')
  return sum(optax.safe_norm(attention_map(a) - attention_map(b), 0.0, axis=-1)
             for a, b in zip(student_maps, teacher_maps, strict=True))
