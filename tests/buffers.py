

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.synth import replay


def stripes(priorities, size=None):
  """A buffer with these priorities [M, N] and `size` live slots; each image tells its slot."""
  priorities = np.asarray(priorities)
  num_tasks, capacity = priorities.shape
  buffer = replay.create(capacity, SHAPE, K, num_tasks, prioritised=True)
  flat = np.arange(num_tasks * capacity, dtype=np.uint8).reshape(num_tasks, capacity)
  return buffer.replace(
      images=jnp.asarray(np.broadcast_to(
          flat[..., None, None, None], (num_tasks, capacity, *SHAPE))),
      labels=jnp.asarray(flat % K, jnp.int32),
      priorities=jnp.asarray(priorities, jnp.result_type(float)),
      size=jnp.int32(capacity if size is None else size))


SHAPE, K = (3, 2, 1), 4


@functools.cache
def program(num):
  """Adding `num` images, compiled once for all examples."""
  del num  # By shape.
  return jax.jit(replay.add)


def batch(index, num_tasks, num):
  """Images and labels of the index-th push, each unlike any other."""
  values = np.arange(num_tasks * num).reshape(num_tasks, num) + 7 * index
  images = np.broadcast_to((values % 251 / 255.0)[..., None, None, None], (num_tasks, num, *SHAPE))
  return (jnp.asarray(images + 0.2 / 255, jnp.float32),
          jnp.asarray((3 * values + index) % K, jnp.int32))
