"""The compiled programs of a distillation's rounds, and the state that they carry on."""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from dfkd_jax import distill, parallel, synth
from dfkd_jax.config import build
from dfkd_jax.models.network import Network
from dfkd_jax.synth import buffer_memory, host_replay, replay
from dfkd_jax.types import PRNGKey, PyTree

Make = Callable[[str | None], synth.Synthesizer]  # From the name of the mapped axis.


class State(struct.PyTreeNode):
  """All that changes in a run."""

  synthesis: PyTree  # the method's
  student: distill.Student


class Programs(NamedTuple):
  """The compiled programs of a run, each compiled once."""

  synthesize: Any  # (synthesis, key, teacher, student network) -> (synthesis, metrics)
  distill: Any  # (student, synthesis, key, teacher) -> (student, synthesis, metrics)
  waits: bool = False  # whether calls return only when all, or nearly, is done


def steps_per_call(config: build.Config) -> int:
  """The student's steps after each call of the method: a round has one call, or several and as many runs of steps."""
  section = config.distill
  return parallel.even_share(section.steps_per_round, section.calls_per_round, 'distill.steps_per_round')


def init(make: Make, mesh: Mesh, key: PRNGKey, teacher: Network) -> PyTree:
  """The method's state, spread over the mesh; of a buffer's images only their shape and place."""

  def whole(key, teacher, *, axis):
    return make(axis).init(key, teacher)

  def without_images(key, teacher, *, axis):
    return host_replay.strip_images(whole(key, teacher, axis=axis))

  shapes, one = jax.eval_shape(functools.partial(whole, axis=None), key, teacher), parallel.REPLICATED
  state = parallel.each_device(
      without_images, mesh, (one, one), parallel.specs(host_replay.strip_images(shapes)))(key, teacher)
  buffer = replay.find_buffer(shapes)
  return state if buffer is None else host_replay.with_image_shapes(state, buffer.images, mesh)


def placed(config, mesh, make, tx, state: State, teacher: Network, *others: PyTree) -> tuple[Programs, State]:
  """The programs for where a buffer's images are to lie, and the state with them there, or to be made there.

  `others` are what else stays on the devices.
  """
  programs, note = buffer_memory.choose_place(
      config.buffer, parallel.memory_limit(config.device_memory_gb), (state, teacher, others), state.synthesis,
      lambda: compiled(config, mesh, make, tx, state, teacher))
  if note and parallel.is_first():
    print(note, file=sys.stderr)
  if programs is None:
    state = state.replace(synthesis=buffer_memory.allocate_on_host(state.synthesis))
    programs = _compiled_for_host(config, mesh, make, tx, state, teacher)
  return programs, state


def _compiled_for_host(config, mesh, make, tx, state: State, teacher: Network) -> Programs:
  """As `compiled`, for a state whose buffer's images are in host memory."""
  num_steps, images = steps_per_call(config), replay.find_buffer(state.synthesis).images
  state = state.replace(synthesis=host_replay.strip_images(state.synthesis))
  one, spread = parallel.REPLICATED, parallel.specs(state.synthesis)

  def slots(synthesis, key, *, axis):
    return distill.sampled_indices(synthesis, key, synthesizer=make(axis), num_steps=num_steps)

  batch, key = (config.distill.batch_size, *images.shape[2:]), jax.random.key(0)
  chunk = host_replay.steps_per_chunk(num_steps, int(np.prod(batch)) // mesh.size)
  part = replay.HostBatches(jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((chunk, *batch), jnp.uint8))
  draw = parallel.each_device(slots, mesh, (spread, one), parallel.BATCHES).lower(state.synthesis, key).compile()
  return Programs(
      host_replay.with_host_writes(_compiled_call(mesh, make, state, teacher)),
      host_replay.with_host_batches(
          draw, compiled_steps(config, mesh, make, tx, state, teacher, part), mesh, num_steps, chunk),
      waits=True)


def compiled(
    config: build.Config, mesh: Mesh, make: Make, tx: optax.GradientTransformation, state: State, teacher: Network
) -> Programs:
  """Compiles both programs of a round for the shapes of this state.

  Args:
    config: Its section `distill` is read.
    mesh: The devices.
    make: The name of the mapped axis -> Synthesizer.
    tx: The student's optimizer.
    state: Only shapes and places matter.
    teacher: Likewise.
  """
  return Programs(
      _compiled_call(mesh, make, state, teacher), compiled_steps(config, mesh, make, tx, state, teacher))


def _compiled_call(mesh, make, state: State, teacher: Network):

  def synthesize(synthesis, key, teacher, student, *, axis):
    return make(axis).synthesize(synthesis, key, teacher, student)

  one, spread = parallel.REPLICATED, parallel.specs(state.synthesis)
  after = spread
  if (buffer := replay.find_buffer(state.synthesis)) is not None and buffer.images is None:
    after = replay.replace_buffer(spread, added=parallel.SPREAD)
  program = parallel.each_device(synthesize, mesh, (spread, one, one, one), (after, one), donate=(0,))
  return program.lower(state.synthesis, jax.random.key(0), teacher, state.student.network).compile()


def compiled_steps(config, mesh, make, tx, state: State, teacher: Network, part: replay.HostBatches | None = None):
  """The student's steps after one call, compiled; with a `part`, for those of its images that are handed in."""
  one, spread = parallel.REPLICATED, parallel.specs(state.synthesis)
  step = distiller(config, make, tx, steps_per_call(config), mesh.size)
  inputs, places = (state.student, state.synthesis, jax.random.key(0), teacher), (one, spread, one, one)
  if part is not None:
    inputs, places = (*inputs, part), (*places, replay.HostBatches(one, parallel.BATCHES))
  program = parallel.each_device(step, mesh, places, (one, spread, one), donate=(0, 1))
  return program.lower(*inputs).compile()


def distiller(
    config: build.Config, make: Make, tx: optax.GradientTransformation, num_steps: int, num_devices: int
) -> Callable:
  """`distill.distill` with the numbers of a config: (student, synthesis, key, teacher, part=None, *, axis)."""
  section = config.distill
  augment = build.augmentation(config.augment.student)
  num_tasks = build.local_tasks_of(config, num_devices)

  def student_steps(student, synthesis, key, teacher, part=None, *, axis):
    return distill.distill(
        student, synthesis, key, teacher, synthesizer=make(axis), tx=tx, num_steps=num_steps,
        temperature=section.temperature, divergence=section.divergence, augment=augment,
        attention_factor=section.attention_factor, num_tasks=num_tasks, axis=axis, part=part)

  return student_steps
