"""Noise: the control. Images of independent uniform pixels, with the teacher's labels.

What a student learns from it shows how much of a result is due to the images, and
not to the teacher's soft labels alone. Nothing is synthesised, so a run is all
student steps.
"""

import jax
import jax.numpy as jnp
from flax import struct

from dfkd_jax import parallel
from dfkd_jax.models.network import Network
from dfkd_jax.synth.synthesizer import Synthesizer
from dfkd_jax.types import Array, Batch, Metrics, PRNGKey


class State(struct.PyTreeNode):
  """Noise carries nothing but its count."""

  step: Array  # [] int32, calls so far


def noise(
    *,
    image_shape: tuple[int, int, int],
    sample_batch_size: int = 256,
    num_tasks: int = 1,
    axis: str | None = None,
) -> Synthesizer:
  """Makes the control.

  Args:
    image_shape: [H, W, C].
    sample_batch_size: Images for one step of the student, on this device.
    num_tasks: Tasks on this device; only the keys of the samples depend on it.
    axis: The mapped axis of devices, if any.
  """
  share = parallel.even_share(sample_batch_size, num_tasks, 'sample_batch_size')

  def init(key: PRNGKey, teacher: Network) -> State:
    del key, teacher
    return State(step=jnp.int32(0))

  def synthesize(
      state: State, key: PRNGKey, teacher: Network, student: Network | None
  ) -> tuple[State, Metrics]:
    del key, teacher, student
    return state.replace(step=state.step + 1), {}

  def sample(state: State, key: PRNGKey) -> Batch:
    del state
    keys = parallel.task_keys(key, num_tasks, axis)
    images = jax.vmap(lambda k: jax.random.uniform(k, (share, *image_shape)))(keys)
    nowhere = jnp.full(sample_batch_size, -1, jnp.int32)
    return Batch(images.reshape(sample_batch_size, *image_shape), nowhere, nowhere)

  return Synthesizer(init, synthesize, sample)
