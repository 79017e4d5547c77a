"""Samples of a method within a run, and what networks compute from them."""

from collections.abc import Callable

import jax
import numpy as np

from dfkd_jax import parallel
from dfkd_jax.models.network import Network
from dfkd_jax.runs.programs import Plan
from dfkd_jax.synth import host_replay, replay
from dfkd_jax.types import PRNGKey, PyTree


def draw(plan: Plan, synthesis: PyTree, key: PRNGKey, number: int,
         measure: Callable[..., PyTree], *networks: Network) -> PyTree:
  """Draws at least `number` images as the student's steps do, and measures them.

  Args:
    plan: The run's; it gives the size of a batch.
    synthesis: State of the method, with images on the devices or on the host.
    key: For the samples.
    number: Of images on all devices, more than 0.
    measure: (images [B, H, W, C] in [0, 1], *networks) -> tree of arrays [B, ...].
    networks: Replicated on the devices.

  Returns:
    The results for all images, as whole NumPy arrays [N, ...] on every process.
  """
  buffer, images, batches = replay.find_buffer(synthesis), None, []
  is_on_host = buffer is not None and isinstance(buffer.images, np.ndarray)
  synthesis = host_replay.strip_images(synthesis) if is_on_host else synthesis

  def sample_slots(synthesis, key, *, axis):
    return plan.make(axis).sample(synthesis, key).slots

  def sample(synthesis, key, images, *networks, axis):
    batch = plan.make(axis).sample(replay.with_batch(synthesis, images), key)
    return measure(batch.images, *networks)

  one, split, spread = parallel.REPLICATED, parallel.SPREAD, parallel.specs(synthesis)
  draw_slots = parallel.each_device(sample_slots, plan.mesh, (spread, one), split)
  draw_batch = parallel.each_device(
      sample, plan.mesh, (spread, one, split, *[one] * len(networks)), split)
  for index in range(-(-number // plan.distill.batch_size)):
    batch_key = jax.random.fold_in(key, index)
    if is_on_host:
      slots = np.asarray(draw_slots(synthesis, jax.random.clone(batch_key)))  # as `sample` draws
      images = host_replay.gather(buffer.images, slots[None])[0]
    batches.append(parallel.gather(draw_batch(synthesis, batch_key, images, *networks)))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
