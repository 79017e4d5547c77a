"""Noise: the control. Images are independent uniform pixels, labelled by the teacher.

The student of such a run shows how much of a result comes from the teacher's soft labels alone.
Nothing is synthesised, so a run consists of student steps.
"""

import jax
import jax.numpy as jnp
from flax import struct

from dfkd_jax.synth.layout import Layout
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Array, Batch


class State(struct.PyTreeNode):
  """Counts the calls."""

  step: Array  # [] int32, calls so far


def noise(*, image_shape: tuple[int, int, int], layout: Layout = Layout()) -> Synthesizer:
  """Makes the control.

  Args:
    image_shape: [H, W, C].
    layout: Batch size of the student's steps, tasks and devices.
  """
  share = layout.share(layout.sample_batch_size, 'sample_batch_size')

  def init(key, teacher):
    del key, teacher
    return State(step=jnp.int32(0))

  def synthesize(state, key, teacher, student):
    del key, teacher, student
    return state.replace(step=state.step + 1), {}

  def sample(state, key):
    del state
    images = layout.draw(key, lambda k: jax.random.uniform(k, (share, *image_shape)))
    unknown = jnp.full(layout.sample_batch_size, -1, jnp.int32)
    return Batch(images.reshape(-1, *image_shape), unknown, unknown)

  return Synthesizer(init, synthesize, sample)
