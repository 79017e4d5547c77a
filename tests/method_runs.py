

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from dfkd_jax import augment, parallel

# They share all with CuDFKD and ZSKT but the factors: tests of one kind show that these are taken.
ALIKE = ('dafl', 'dfad', 'dfq')


def run(method, calls=1, in_float64=False):
  """The state after each call, and the metrics of each; one program for all calls."""
  cast = toys.float64 if in_float64 else lambda tree: tree
  teacher, student = cast(toys.teacher()), cast(toys.student())
  state = toys.jit(method.init)(jax.random.key(0), teacher)
  synthesize = toys.jit(method.synthesize)
  states, metrics = [state], []
  for index in range(calls):
    state, found = synthesize(state, jax.random.key(10 + index), teacher, student)
    states.append(state)
    metrics.append(found)
  assert synthesize._cache_size() == 1
  return states, metrics


def assert_close(tree, other, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, other)


def largest_difference(tree, other):
  return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), tree, other)))


class Noting:
  """An augmentation that notes, step by step, what it is given and what it makes of that."""

  def __init__(self, function=augment.identity):
    self.function, self.notes = function, []

  def __call__(self, key, images):
    seen = self.function(key, images)
    # As bytes, since a callback's thread knows nothing of float64.
    as_bytes = (jax.lax.bitcast_convert_type(each, jnp.uint8) for each in (images, seen))
    note = lambda *both: self.notes.append(
        [np.array(each).view(images.dtype)[..., 0] for each in both])
    jax.debug.callback(note, *as_bytes, ordered=True)
    return seen

  def given_and_seen(self):
    """[steps, B, H, W, C], twice."""
    jax.effects_barrier()
    return (np.stack(each) for each in zip(*self.notes, strict=True))


def one_by_one(method, num_tasks, networks):
  """States and metrics of a method of one task, with the keys of `num_tasks` tasks in turn."""
  task_keys = parallel.task_keys

  @toys.jit
  def call(state, key, task, networks):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(
          parallel, 'task_keys', lambda key, *_: task_keys(key, num_tasks, None)[task][None])
      return method.synthesize(state, key, *networks)

  state = toys.jit(method.init)(jax.random.key(0), networks[0])
  return [call(state, jax.random.key(5), task, networks) for task in range(num_tasks)]


def on_devices(create, networks, size, calls=2):
  """State and metrics after calls of four tasks, by `create(num_tasks, axis)` on `size` devices."""
  mesh, one = parallel.make_mesh(size), parallel.REPLICATED
  state = toys.jit(create(4, None).init)(jax.random.key(0), networks[0])
  spread = parallel.specs(state)
  step = lambda *inputs, axis: create(4 // size, axis).synthesize(*inputs)
  program = toys.jit(parallel.each_device(step, mesh, (spread, one, one, one), (spread, one)))
  state, networks = parallel.place(mesh, state), parallel.place(mesh, networks)
  for index in range(calls):
    state, metrics = program(state, jax.random.key(20 + index), *networks)
  return jax.device_get((state, metrics))


def abstract_call(method, teacher, student):
  state = jax.eval_shape(method.init, jax.random.key(0), teacher)
  return jax.eval_shape(
      lambda state, key, teacher: method.synthesize(state, key, teacher, student), state,
      jax.random.key(1), teacher)
