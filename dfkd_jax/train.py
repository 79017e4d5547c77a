"""Data-free distillation as a run: rounds of synthesis and of student steps, evaluation, checkpoints, report."""

import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from dfkd_jax import (
  build,
  checks,
  distill,
  held_out,
  host_buffer,
  parallel,
  preflight,
  processes,
  report,
  supervised,
  synth,
)
from dfkd_jax.experiment import Experiment, fingerprint
from dfkd_jax.models.network import Network
from dfkd_jax.synth import replay
from dfkd_jax.types import Batch, PRNGKey, PyTree

Make = Callable[[str | None], synth.Synthesizer]  # From the name of the mapped axis.


_FOR_LOOKING = 1 << 31  # Rounds are counted below it.


class State(struct.PyTreeNode):
  """All that changes in a run."""

  synthesis: PyTree  # the method's
  student: distill.Student


class Programs(NamedTuple):
  """The compiled programs of a run, each compiled once."""

  synthesize: Any  # (synthesis, key, teacher, student network) -> (synthesis, metrics)
  distill: Any  # (student, synthesis, key, teacher) -> (student, synthesis, metrics)
  waits: bool = False  # whether calls return only when all, or nearly, is done


def run(
    config: build.Config, workdir: str, command: str | None = None, teacher: Network | None = None
) -> dict[str, Any]:
  """Runs a config; results go to `workdir`, and come back as the summary.

  The same config in the same folder goes on where it stopped; if it had come to its end, its summary is returned.
  Of several processes (`processes.initialize`) all must call this, with the same config and a folder that all see.

  Args:
    config: With the fields of configs/common.py.
    workdir: Made if missing.
    command: That started the run, for the record.
    teacher: A network of yours (`models.bind`), in the place of the one that the config's section `teacher` names.

  Raises:
    ValueError: Something in the config, the data or the weights does not fit; in one line, and nothing was written.
  """
  checks.check(config)
  processes.initialize(**config.distributed.to_dict())
  parallel.check_alike(fingerprint(config), 'The config')
  if config.precision:
    jax.config.update('jax_default_matmul_precision', config.precision)
  if config.compilation_cache:
    jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(config.compilation_cache).expanduser()))
    compilation_cache.reset_cache()  # Else it is ignored where anything was compiled before.
  if config.job == 'train':
    return supervised.run(config, workdir, command)
  return {'distill': run_distillation, 'check': preflight.run}[config.job](config, workdir, command, teacher)


def run_distillation(
    config: build.Config, workdir: str, command: str | None = None, teacher: Network | None = None
) -> dict[str, Any]:
  """Distils the teacher, that of the config unless another is given, into the student without data.

  Writes metrics.jsonl, summary.json, images.png, student.safetensors and checkpoints.
  """
  section = config.distill
  mesh = build.mesh(config)
  with parallel.together():
    make = build.synthesizer(config, mesh.size)
    make(None)  # Whatever is wrong with its numbers is said before anything is loaded.
    steps_per_call(config)
    build.augmentation(config.augment.student)
    tx = build.optimizer(config, section.rounds - section.distill_after, section.steps_per_round)
    experiment = Experiment(config, workdir, 'round', command)
    if (summary := experiment.finished()) is not None:
      return summary
    with experiment.ledger.part('setup'):
      keys = jax.random.split(jax.random.key(config.seed), 5)
      student_key, init_key, run_key, control_key, picture_key = keys
      source = None if teacher else config.teacher.source
      teacher, judge = teacher or build.teacher(config), build.judge(config)
      # On the host, since what is placed will be donated, and the control starts from the same.
      network = jax.tree.map(np.array, build.network(config, 'student', student_key))
    factors = found = None
    if config.preflight.enabled:
      with experiment.ledger.part('preflight'):
        factors, found = preflight.report(config, teacher, network, source)
      make = build.synthesizer(config, mesh.size, factors)
    teacher, judge = (of and parallel.place(mesh, of) for of in (teacher, judge))
  with experiment.ledger.part('setup'):
    state = State(_init(make, mesh, init_key, teacher), parallel.place(mesh, distill.init(network, tx)))
  with experiment.ledger.part('compile'):
    programs, state = _programs(config, mesh, make, tx, state, teacher)
    look = _held_out(experiment, mesh, factors, state, teacher, judge)
  with experiment:  # All that can be wrong was found by now.
    build.tell_unused_devices(config, mesh.size)
    state, done = experiment.resume(state)
    state = state.replace(synthesis=host_buffer.made(state.synthesis))
    metrics_of_teacher = experiment.follow(teacher) if experiment.test else None
    advance = functools.partial(_round, experiment, programs, run_key, teacher)
    evaluate = functools.partial(_evaluate, experiment, look, run_key)
    state = experiment.loop(state, done, section.rounds, advance, evaluate)
    supervised.write_weights(
        experiment.workdir / 'student.safetensors', state.student.network, config.student.name,
        tuple(config.dataset.image_shape))
    _write_images(experiment, mesh, make, state.synthesis, teacher, picture_key)
    control = _control(experiment, mesh, tx, network, teacher, control_key) if config.control else None
    return experiment.summary(
        num_devices=mesh.size, files=('student.safetensors', 'images.png'), teacher=metrics_of_teacher, control=control,
        preflight=found, selection=experiment.selection,
        rates=_rates(config, experiment.ledger.seconds()), external_prior=config.method.get('embeddings'),
        parameters={'student': network.num_params(), 'teacher': teacher.num_params()})


def steps_per_call(config: build.Config) -> int:
  """The student's steps after each call of the method: a round has one call, or several and as many runs of steps."""
  section = config.distill
  return parallel.even_share(section.steps_per_round, section.calls_per_round, 'distill.steps_per_round')


def _held_out(experiment, mesh: Mesh, factors, state: State, teacher: Network, judge: Network | None):
  """(synthesis, key, student) -> metrics on fresh synthetic images; None where real ones do, and nobody else looks."""
  if experiment.test is not None and judge is None:
    return None
  small = build.Config(experiment.config.to_dict())
  if 'capacity' in small.method:
    small.method.capacity = build.tasks_of(small) * small.method.batch_size
  make = build.synthesizer(small, mesh.size, factors)
  program = held_out.compiled(mesh, make, state.synthesis, teacher, state.student.network, judge)
  return lambda synthesis, key, student: program(
      held_out.without_images(synthesis), key, teacher, student, judge)


def _evaluate(experiment, look, run_key: PRNGKey, state: State, done: int) -> dict[str, float]:
  """The student on real images if there are any, and what `look` finds."""
  found = experiment.evaluate(state.student.network) if experiment.test is not None else {}
  if look is not None:
    with experiment.ledger.part('evaluation'):
      key = jax.random.fold_in(run_key, _FOR_LOOKING + done)
      found |= {name: float(np.asarray(value)) for name, value in look(
          state.synthesis, key, state.student.network).items()}
  return found


def _rates(config: build.Config, seconds: dict[str, float]) -> dict[str, float]:
  """Images a second once compiled: inner steps times images, and images that the student saw."""
  section, method = config.distill, config.method
  images_a_call = build.tasks_of(config) * method.get('batch_size', 0) * method.get('num_steps', 0)
  image_steps = section.rounds * section.calls_per_round * images_a_call
  images = (section.rounds - section.distill_after) * section.steps_per_round * section.batch_size
  return {'synthesis_image_steps': image_steps / seconds['synthesis'], 'student_images': images / seconds['student']}


def _init(make: Make, mesh: Mesh, key: PRNGKey, teacher: Network) -> PyTree:
  """The method's state, spread over the mesh; of a buffer's images only their shape and place."""

  def init(key, teacher, *, axis):
    return make(axis).init(key, teacher)

  def without_images(key, teacher, *, axis):
    return host_buffer.without(init(key, teacher, axis=axis))

  shapes, one = jax.eval_shape(functools.partial(init, axis=None), key, teacher), parallel.REPLICATED
  state = parallel.each_device(
      without_images, mesh, (one, one), parallel.specs(host_buffer.without(shapes)))(key, teacher)
  buffer = replay.of(shapes)
  return state if buffer is None else host_buffer.with_places(state, buffer.images, mesh)


def _programs(config, mesh, make, tx, state: State, teacher: Network) -> tuple[Programs, State]:
  """The programs for where a buffer's images are to lie, and the state with them there, or to be made there."""
  programs, note = host_buffer.on_devices(
      host_buffer.checked(config.buffer, state.synthesis), parallel.memory_limit(config.device_memory_gb),
      (state, teacher), state.synthesis, lambda: compiled(config, mesh, make, tx, state, teacher))
  if note and parallel.is_first():
    print(note, file=sys.stderr)
  if programs is None:
    state = state.replace(synthesis=host_buffer.on_host(state.synthesis))
    programs = _compiled_for_host(config, mesh, make, tx, state, teacher)
  return programs, state


def _compiled_for_host(config, mesh, make, tx, state: State, teacher: Network) -> Programs:
  """As `compiled`, for a state whose buffer's images are in host memory."""
  num_steps, images = steps_per_call(config), replay.of(state.synthesis).images
  state = state.replace(synthesis=host_buffer.without(state.synthesis))
  one, spread = parallel.REPLICATED, parallel.specs(state.synthesis)

  def slots(synthesis, key, *, axis):
    return distill.slots(synthesis, key, synthesizer=make(axis), num_steps=num_steps)

  batch, key = (config.distill.batch_size, *images.shape[2:]), jax.random.key(0)
  chunk = host_buffer.chunk_of(num_steps, int(np.prod(batch)) // mesh.size)
  part = distill.Part(jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((chunk, *batch), jnp.uint8))
  draw = parallel.each_device(slots, mesh, (spread, one), parallel.BATCHES).lower(state.synthesis, key).compile()
  return Programs(
      host_buffer.keeping(_compiled_call(mesh, make, state, teacher)),
      host_buffer.handing(
          draw, _compiled_steps(config, mesh, make, tx, state, teacher, part), mesh, num_steps, chunk),
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
      _compiled_call(mesh, make, state, teacher), _compiled_steps(config, mesh, make, tx, state, teacher))


def _compiled_call(mesh, make, state: State, teacher: Network):

  def synthesize(synthesis, key, teacher, student, *, axis):
    return make(axis).synthesize(synthesis, key, teacher, student)

  one, spread = parallel.REPLICATED, parallel.specs(state.synthesis)
  after = spread
  if (buffer := replay.of(state.synthesis)) is not None and buffer.images is None:
    after = replay.with_fields(spread, added=parallel.SPREAD)
  program = parallel.each_device(synthesize, mesh, (spread, one, one, one), (after, one), donate=(0,))
  return program.lower(state.synthesis, jax.random.key(0), teacher, state.student.network).compile()


def _compiled_steps(config, mesh, make, tx, state: State, teacher: Network, part: distill.Part | None = None):
  one, spread = parallel.REPLICATED, parallel.specs(state.synthesis)
  step = distiller(config, make, tx, steps_per_call(config), mesh.size)
  inputs, places = (state.student, state.synthesis, jax.random.key(0), teacher), (one, spread, one, one)
  if part is not None:
    inputs, places = (*inputs, part), (*places, distill.Part(one, parallel.BATCHES))
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


def _round(experiment, programs: Programs, run_key: PRNGKey, teacher: Network, state: State, index: int):
  """One round: as many calls as it has, each of synthesis, and of student steps once there is enough to learn from."""
  section, learnt = experiment.config.distill, []
  for call in range(section.calls_per_round):
    key = jax.random.fold_in(run_key, index * section.calls_per_round + call)
    key_synthesis, key_student = jax.random.split(key)
    began = time.perf_counter()
    synthesis, metrics = programs.synthesize(state.synthesis, key_synthesis, teacher, state.student.network)
    called, student = time.perf_counter(), state.student
    if index >= section.distill_after:
      student, synthesis, found = programs.distill(student, synthesis, key_student, teacher)
      learnt.append(found)
    # Both programs are under way; only now is anything waited for, unless their images are elsewhere.
    numbers = {f'synthesis_{name}': float(np.asarray(values)[-1]) for name, values in metrics.items()}
    between = called if programs.waits else time.perf_counter()
    jax.block_until_ready(student.step)
    experiment.ledger.add('synthesis', between - began)
    experiment.ledger.add('student', time.perf_counter() - between)
    state = State(synthesis, student)
  if learnt:  # `agreement` is that on real images.
    means = {name: float(np.mean([found[name] for found in learnt])) for name in learnt[0]}
    numbers |= {'loss': means['loss'], 'synthetic_agreement': means['agreement'],
                **{name: means[name] for name in ('weight', 'weighed_loss')}}
  return state, numbers


def _control(experiment, mesh, tx, network: Network, teacher: Network, key: PRNGKey) -> dict[str, float]:
  """A student with the same start and as many steps on noise: what the images are worth is the difference."""
  config = experiment.config
  section, num_tasks = config.distill, build.local_tasks_of(config, mesh.size)
  make = lambda axis: synth.create(
      'noise', image_shape=tuple(config.dataset.image_shape), sample_batch_size=section.batch_size // mesh.size,
      num_tasks=num_tasks, axis=axis)
  with experiment.ledger.part('compile'):
    state = State(_init(make, mesh, key, teacher), parallel.place(mesh, distill.init(network, tx)))
    program = _compiled_steps(config, mesh, make, tx, state, teacher)
  with experiment.ledger.part('control'):
    student, synthesis = state.student, state.synthesis
    for index in range((section.rounds - section.distill_after) * section.calls_per_round):
      student, synthesis, _ = program(student, synthesis, jax.random.fold_in(key, index), teacher)
    jax.block_until_ready(student.step)
  return experiment.evaluate(student.network)


def _write_images(experiment, mesh: Mesh, make: Make, synthesis: PyTree, teacher: Network, key: PRNGKey) -> None:
  """A grid of samples, first of every class one, with the teacher's labels."""
  section = experiment.config.grid
  wanted = section.columns * section.rows
  sample = _sampler(mesh, make, synthesis, experiment.task)
  num_batches = 1 + 4 * wanted // experiment.config.distill.batch_size  # So many that most classes have enough.
  batches = [
      parallel.gather(sample(synthesis, jax.random.fold_in(key, index), teacher)) for index in range(num_batches)]
  drawn = Batch(*map(np.concatenate, zip(*batches, strict=True)))
  turn = np.zeros(len(drawn.labels), int)  # The how-manieth of its class each image is.
  for label in np.unique(drawn.labels):
    turn[drawn.labels == label] = np.arange((drawn.labels == label).sum())
  order = np.lexsort((drawn.labels, turn))[:wanted]
  names = [experiment.class_name(label) for label in drawn.labels[order]]
  report.image_grid(experiment.workdir / 'images.png', drawn.images[order], names, section.columns)


def _sampler(mesh: Mesh, make: Make, synthesis: PyTree, task) -> Callable[[PyTree, PRNGKey, Network], Batch]:
  """(state, key, teacher) -> a batch with the teacher's labels where the method knows none."""

  def slots(synthesis, key, *, axis):
    return make(axis).sample(synthesis, key).slots

  def labelled(synthesis, key, images, teacher, *, axis):
    batch = make(axis).sample(replay.given(synthesis, images), key)
    seen = task.predicted(teacher(batch.images).logits)
    return batch._replace(labels=jnp.where(batch.labels < 0, seen, batch.labels))

  one, split, spread = parallel.REPLICATED, parallel.SPREAD, parallel.specs(host_buffer.as_taken(synthesis))
  return host_buffer.giving(
      parallel.each_device(slots, mesh, (spread, one), split),
      parallel.each_device(labelled, mesh, (spread, one, split, one), split))
