"""Data-free distillation as a run: rounds of synthesis and of student steps, evaluation, checkpoints, report."""

import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

from dfkd_jax import build, distill, parallel, report, supervised, synth
from dfkd_jax.experiment import Experiment
from dfkd_jax.models.network import Network
from dfkd_jax.types import PRNGKey, PyTree


class State(struct.PyTreeNode):
  """All that changes in a run."""

  synthesis: PyTree  # the method's
  student: distill.Student


class Programs(NamedTuple):
  """The compiled programs of a run, each compiled once."""

  synthesize: Any  # (synthesis, key, teacher, student network) -> (synthesis, metrics)
  distill: Any  # (student, synthesis, key, teacher) -> (student, synthesis, metrics)


def run(config: build.Config, workdir: str) -> dict[str, Any]:
  """Runs a config; results go to `workdir`, and come back as the summary.

  Raises:
    ValueError: Something in the config, the data or the weights does not fit; one line.
  """
  if config.compilation_cache:
    jax.config.update('jax_compilation_cache_dir', config.compilation_cache)
  job = synth.known(config.job, ('distill', 'train'), 'job')
  return run_distillation(config, workdir) if job == 'distill' else supervised.run(config, workdir)


def run_distillation(config: build.Config, workdir: str) -> dict[str, Any]:
  """Distils the teacher into the student without data.

  Writes metrics.jsonl, summary.json, images.png, student.safetensors and checkpoints.
  """
  section = config.distill
  mesh = build.mesh(config)
  make = build.synthesizer(config, mesh.size)
  make(None)  # Whatever is wrong with its numbers is said before anything is loaded.
  with Experiment(config, workdir, 'round') as experiment:
    with experiment.ledger.part('setup'):
      teacher = parallel.place(mesh, build.teacher(config))
      student_key, init_key, run_key, control_key = jax.random.split(jax.random.key(config.seed), 4)
      tx = build.optimizer(config, max(section.rounds - section.distill_after, 1), section.steps_per_round)
      network = build.network(config, 'student', student_key)
      state = State(_init(make, mesh, init_key, teacher), parallel.place(mesh, distill.init(network, tx)))
    metrics_of_teacher = experiment.follow(teacher)
    with experiment.ledger.part('compile'):
      programs = compiled(config, mesh, make, tx, state, teacher)
    state, done = experiment.resume(state)
    advance = functools.partial(_round, experiment, programs, run_key, teacher)
    state = experiment.loop(state, done, section.rounds, advance, lambda state: state.student.network)
    supervised.write_weights(experiment.workdir / 'student.safetensors', state.student.network, config.student.name)
    _write_images(experiment, make(None), state.synthesis, run_key)
    control = _control(experiment, mesh, tx, network, teacher, control_key) if config.control else None
    return experiment.summary(
        student={'last': experiment.last, 'best': experiment.best}, teacher=metrics_of_teacher, control=control,
        parameters={'student': network.num_params(), 'teacher': teacher.num_params()})


def _init(make, mesh, key: PRNGKey, teacher: Network) -> PyTree:
  """The method's state, spread over the mesh."""
  init = lambda key, teacher, *, axis: make(axis).init(key, teacher)
  shapes = jax.eval_shape(functools.partial(init, axis=None), key, teacher)
  return parallel.each_device(
      init, mesh, (parallel.REPLICATED, parallel.REPLICATED), parallel.specs(shapes))(key, teacher)


def compiled(config: build.Config, mesh, make, tx, state: State, teacher: Network) -> Programs:
  """Compiles both programs of a round for the shapes of this state.

  Args:
    config: Its section `distill` is read.
    mesh: The devices.
    make: The name of the mapped axis -> Synthesizer.
    tx: The student's optimizer.
    state: Only shapes and places matter.
    teacher: Likewise.
  """
  one, spread = parallel.REPLICATED, parallel.specs(state.synthesis)
  key = jax.random.key(0)
  synthesize = parallel.each_device(
      lambda synthesis, key, teacher, student, *, axis: make(axis).synthesize(synthesis, key, teacher, student),
      mesh, (spread, one, one, one), (spread, one), donate=(0,))
  step = distiller(config, make, tx, config.distill.steps_per_round)
  student_steps = parallel.each_device(step, mesh, (one, spread, one, one), (one, spread, one), donate=(0, 1))
  return Programs(
      synthesize.lower(state.synthesis, key, teacher, state.student.network).compile(),
      student_steps.lower(state.student, state.synthesis, key, teacher).compile())


def distiller(config: build.Config, make, tx, num_steps: int):
  """`distill.distill` with the numbers of a config: (student, synthesis, key, teacher, *, axis)."""
  section = config.distill
  augment = build.augmentation(config.augment.student)

  def step(student, synthesis, key, teacher, *, axis):
    return distill.distill(
        student, synthesis, key, teacher, synthesizer=make(axis), tx=tx, num_steps=num_steps,
        temperature=section.temperature, divergence=section.divergence, augment=augment,
        num_tasks=config.method.get('num_tasks', 1), axis=axis)

  return step


def _round(experiment, programs: Programs, run_key: PRNGKey, teacher: Network, state: State, index: int):
  """One round: synthesis, and student steps once there is enough to learn from."""
  key_synthesis, key_student = jax.random.split(jax.random.fold_in(run_key, index))
  began = time.perf_counter()
  synthesis, metrics = programs.synthesize(state.synthesis, key_synthesis, teacher, state.student.network)
  student, learnt = state.student, {}
  if index >= experiment.config.distill.distill_after:
    student, synthesis, learnt = programs.distill(student, synthesis, key_student, teacher)
  # Both programs are under way; only now is anything waited for.
  numbers = {f'synthesis_{name}': float(np.asarray(values)[-1]) for name, values in metrics.items()}
  between = time.perf_counter()
  numbers |= {name: float(value) for name, value in learnt.items()}
  jax.block_until_ready(student.step)
  experiment.ledger.add('synthesis', between - began)
  experiment.ledger.add('student', time.perf_counter() - between)
  return State(synthesis, student), numbers


def _control(experiment, mesh, tx, network: Network, teacher: Network, key: PRNGKey) -> dict[str, float]:
  """A student with the same start and as many steps on noise: what the images are worth is the difference."""
  config = experiment.config
  section = config.distill
  rounds = max(section.rounds - section.distill_after, 0)
  num_tasks = config.method.get('num_tasks', 1)
  share = section.batch_size // mesh.size
  make = lambda axis: synth.create(
      'noise', image_shape=tuple(config.dataset.image_shape), sample_batch_size=share, num_tasks=num_tasks, axis=axis)
  with experiment.ledger.part('control'):
    student = parallel.place(mesh, distill.init(network, tx))
    synthesis = _init(make, mesh, key, teacher)
    one, spread = parallel.REPLICATED, parallel.specs(synthesis)
    program = parallel.each_device(
        distiller(config, make, tx, section.steps_per_round), mesh, (one, spread, one, one), (one, spread, one),
        donate=(0, 1))
    for index in range(rounds):
      student, synthesis, _ = program(student, synthesis, jax.random.fold_in(key, index), teacher)
    jax.block_until_ready(student.step)
  return experiment.evaluate(student.network)


def _write_images(experiment, synthesizer: synth.Synthesizer, synthesis: PyTree, key: PRNGKey) -> None:
  """A grid of samples, a column for each class as far as there are any, with the teacher's labels."""
  section = experiment.config.grid
  columns, wanted = section.columns, section.columns * section.rows
  batches = [jax.jit(synthesizer.sample)(synthesis, jax.random.fold_in(key, index)) for index in range(4)]
  images = np.concatenate([np.asarray(batch.images) for batch in batches])
  labels = np.concatenate([np.asarray(batch.labels) for batch in batches])
  if (labels < 0).any():  # Of the control.
    return
  turn = np.zeros(len(labels), int)  # The how-manieth of its class each image is.
  for label in np.unique(labels):
    turn[labels == label] = np.arange((labels == label).sum())
  order = np.lexsort((labels, turn))[:wanted]
  names = experiment.test.class_names
  report.image_grid(experiment.workdir / 'images.png', images[order], [names[k] for k in labels[order]], columns)
