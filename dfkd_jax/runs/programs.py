"""The compiled programs of a distillation's rounds, and the state that they carry on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from dfkd_jax import distill, parallel, report, synth
from dfkd_jax.config.records import Distill
from dfkd_jax.models.network import Network
from dfkd_jax.synth import host_replay, replay
from dfkd_jax.types import Array, PRNGKey, PyTree

Make = Callable[[str | None], synth.Synthesizer]  # (mapped axis) -> method


class State(struct.PyTreeNode):
  """All that changes in a run."""

  synthesis: PyTree  # the method's state
  student: distill.Student


class Programs(NamedTuple):
  """The compiled programs of a run, each compiled once."""

  synthesize: Any  # (synthesis, key, teacher, student network) -> (synthesis, metrics)
  distill: Any  # (student, synthesis, key, teacher) -> (student, synthesis, metrics)
  waits: bool = False  # whether a call returns only when its work is done, or nearly


class Plan(NamedTuple):
  """The parts of the programs."""

  mesh: Mesh
  make: Make
  tx: optax.GradientTransformation  # the student's optimizer
  distill: Distill
  augment: Callable[[PRNGKey, Array], Array]  # of the student's images
  num_tasks: int  # on each device


def init(make: Make, mesh: Mesh, key: PRNGKey, teacher: Network) -> PyTree:
  """Initialises the method on the mesh; a buffer's images are shapes only."""

  def init_without_images(key, teacher, *, axis):
    return host_replay.strip_images(make(axis).init(key, teacher))

  shapes, one = jax.eval_shape(make(None).init, key, teacher), parallel.REPLICATED
  specs = parallel.specs(host_replay.strip_images(shapes))
  state = parallel.each_device(init_without_images, mesh, (one, one), specs)(key, teacher)
  buffer = replay.find_buffer(shapes)
  if buffer is None:
    return state
  shape = (mesh.size * buffer.images.shape[0], *buffer.images.shape[1:])  # of all devices
  sharding = NamedSharding(mesh, parallel.SPREAD)
  return replay.replace_buffer(
      state, images=jax.ShapeDtypeStruct(shape, buffer.images.dtype, sharding=sharding))


def place_and_compile(plan: Plan, state: State, teacher: Network, *others: PyTree, buffer: str,
                      memory: int | None) -> tuple[Programs, State]:
  """Chooses where a buffer's images lie, and compiles the programs for that.

  The `state` has shapes in place of the buffer's images. Teacher and others stay on the devices,
  which have `memory` bytes each (None: unlimited). The `buffer` is 'device', 'host' or 'auto'.
  Returns the programs, and the state with images on the host or still to be allocated on devices.
  """
  programs, note = host_replay.choose_place(
      buffer, memory, (state, teacher, others), state.synthesis,
      lambda: compile_programs(plan, state, teacher))
  if note:
    report.note(note)
  if programs is None:
    state = state.replace(synthesis=host_replay.allocate_on_host(state.synthesis))
    programs = _compile_for_host(plan, state, teacher)
  return programs, state


def compile_programs(plan: Plan, state: State, teacher: Network) -> Programs:
  """Compiles both programs of a round; of state and teacher only shapes and places matter."""
  return Programs(_compile_call(plan, state, teacher), compile_steps(plan, state, teacher))


def _compile_for_host(plan: Plan, state: State, teacher: Network) -> Programs:
  """Compiles both programs for a buffer with images in host memory."""
  num_steps, images = plan.distill.steps_per_call, replay.find_buffer(state.synthesis).images
  state = state.replace(synthesis=host_replay.strip_images(state.synthesis))

  def sample_indices(synthesis, key, *, axis):
    return distill.sampled_indices(
        synthesis, key, synthesizer=plan.make(axis), num_steps=num_steps)

  places = parallel.specs(state.synthesis), parallel.REPLICATED
  indices = parallel.each_device(sample_indices, plan.mesh, places, parallel.BATCHES)
  indices = indices.lower(state.synthesis, jax.random.key(0)).compile()
  batch = (plan.distill.batch_size, *images.shape[2:])
  chunk = host_replay.steps_per_chunk(num_steps, int(np.prod(batch)) // plan.mesh.size)
  steps = compile_steps(plan, state, teacher, replay.HostBatches(
      jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((chunk, *batch), jnp.uint8)))
  return Programs(
      host_replay.with_host_writes(_compile_call(plan, state, teacher)),
      host_replay.with_host_batches(indices, steps, plan.mesh, num_steps, chunk), waits=True)


def _compile_call(plan: Plan, state: State, teacher: Network) -> Any:

  def synthesize(synthesis, key, teacher, student, *, axis):
    return plan.make(axis).synthesize(synthesis, key, teacher, student)

  one, spread = parallel.REPLICATED, parallel.specs(state.synthesis)
  buffer, results = replay.find_buffer(state.synthesis), spread
  if buffer is not None and buffer.images is None:
    results = replay.replace_buffer(spread, added=parallel.SPREAD)
  program = parallel.each_device(
      synthesize, plan.mesh, (spread, one, one, one), (results, one), donate=(0,))
  return program.lower(
      state.synthesis, jax.random.key(0), teacher, state.student.network).compile()


def compile_steps(
    plan: Plan, state: State, teacher: Network, batches: replay.HostBatches | None = None) -> Any:
  """Compiles the student's steps after one call; `batches` are images that the host hands in."""
  rounds = plan.distill

  def student_steps(student, synthesis, key, teacher, part=None, *, axis):
    return distill.distill(
        student, synthesis, key, teacher, synthesizer=plan.make(axis), tx=plan.tx,
        num_steps=rounds.steps_per_call, temperature=rounds.temperature,
        divergence=rounds.divergence, augment=plan.augment, num_tasks=plan.num_tasks,
        attention_factor=rounds.attention_factor, mosaic_side=rounds.mosaic, axis=axis, part=part)

  one, spread = parallel.REPLICATED, parallel.specs(state.synthesis)
  inputs = (state.student, state.synthesis, jax.random.key(0), teacher)
  places = (one, spread, one, one)
  if batches is not None:
    inputs, places = (*inputs, batches), (*places, replay.HostBatches(one, parallel.BATCHES))
  program = parallel.each_device(
      student_steps, plan.mesh, places, (one, spread, one), donate=(0, 1))
  return program.lower(*inputs).compile()
