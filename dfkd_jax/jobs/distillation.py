"""Distillation without data: rounds of synthesis and of student steps."""

import functools
import json
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dfkd_jax import distill, parallel
from dfkd_jax.config import build, records
from dfkd_jax.evaluate import synthetic_images
from dfkd_jax.jobs import noise_control, preflight, sample_images, supervised
from dfkd_jax.models.network import Network
from dfkd_jax.runs import init_from, non_finite, programs
from dfkd_jax.runs import signals as run_signals
from dfkd_jax.runs.loop import Experiment
from dfkd_jax.synth import host_replay, objective
from dfkd_jax.types import PRNGKey

_FOR_LOOKING = 1 << 31  # Rounds are counted below it.


def run_distillation(
    config: build.Config, workdir: str, command: str | None = None, teacher: Network | None = None,
    resume: str | None = None, asked: run_signals.StopRequest | None = None,
) -> dict[str, Any]:
  """Distils the teacher, that of the config unless another is given, into the student without data.

  Writes metrics.jsonl, summary.json, images.png, student.safetensors, student_best.safetensors and checkpoints.
  Arguments are those of `run`; `asked` says whether to end early.
  """
  section = config.distill
  mesh = build.mesh(config)
  with parallel.raise_on_all_processes():
    make = build.synthesizer(config, mesh.size)
    make(None)  # Whatever is wrong with its numbers is said before anything is loaded.
    programs.steps_per_call(config)
    build.augmentation(config.augment.student)
    tx = build.optimizer(config, section.rounds - section.distill_after, section.steps_per_round)
    experiment = Experiment(config, workdir, 'round', command, resume, asked)
    with experiment.ledger.part('setup'):
      keys = jax.random.split(jax.random.key(config.seed), 5)
      student_key, init_key, run_key, control_key, picture_key = keys
      source = None if teacher else config.teacher.source
      teacher, judge = teacher or build.teacher(config), build.judge(config)
      card = build.card(teacher, source)
      sources, stored = records.InitFrom(**config.init_from), experiment.store.stored
      unread = init_from.unread_sources(sources, stored, config.control)
      experiment.store.check_identity(
          teacher=card.sha256, judge=judge and build.card(judge, config.judge.source, 'judge').sha256,
          **init_from.source_digests(sources, unread, stored))
    if (summary := experiment.store.finished_summary()) is not None:
      return summary
    with experiment.ledger.part('setup'):
      # On the host, since what is placed will be donated, and the control starts from the same.
      network = init_from.load_student(
          build.network(config, 'student', student_key), unread.student, tuple(config.dataset.image_shape))
      network = jax.tree.map(np.array, network)
    factors = _factors(experiment, teacher, network, card)
    make = build.synthesizer(config, mesh.size, factors)
    teacher, judge = (of and parallel.place(mesh, of) for of in (teacher, judge))
  parallel.check_same_on_all(json.dumps([experiment.store.meta['weights'], factors]), "The weights of the teacher and judge")
  with experiment.ledger.part('setup'):
    synthesis = programs.init(make, mesh, init_key, teacher)
    with parallel.raise_on_all_processes():
      synthesis = init_from.load_generator(make(None), synthesis, unread.generator, mesh)
    state = programs.State(synthesis, parallel.place(mesh, distill.init(network, tx)))
  with experiment.ledger.part('compile'):
    compiled, state = programs.placed(config, mesh, make, tx, state, teacher, judge)
    finite = non_finite.compile_finite_check((state.student, host_replay.strip_images(state.synthesis)))
    look = _held_out(experiment, mesh, make, state, teacher, judge)
  with experiment:  # All that can be wrong was found by now.
    build.tell_unused_devices(config, mesh.size)
    state, done = experiment.store.resume(state, 'round', section.rounds)
    state = state.replace(synthesis=host_replay.allocate(state.synthesis))
    metrics_of_teacher = experiment.follow(teacher) if experiment.test else None
    advance = functools.partial(_round, experiment, compiled, finite, run_key, teacher)
    evaluate = functools.partial(_evaluate, experiment, look, run_key)
    state = experiment.loop(state, done, section.rounds, advance, evaluate)
    files = supervised.write_students(experiment, 'student', state.student.network)
    looked_at = sample_images.write(experiment, mesh, make, state.synthesis, teacher, judge, picture_key)
    noise = noise_control.run(experiment, mesh, tx, network, teacher, control_key) if config.control else None
    return experiment.summary(
        num_devices=mesh.size, files=(*files, 'images.png'), teacher=metrics_of_teacher, control=noise,
        preflight=experiment.store.meta['preflight'], images=looked_at, selection=experiment.selection,
        rates=_rates(config, experiment.ledger.seconds()), external_prior=config.method.get('embeddings'),
        parameters={'student': network.num_params(), 'teacher': teacher.num_params()})


def _factors(experiment: Experiment, teacher: Network, student: Network, card) -> objective.Factors | None:
  """What the preflight goes on with; that of a run which is gone on with was at its beginning. None: the config's."""
  found = experiment.store.stored.get('preflight')
  if experiment.config.preflight.enabled and found is None:
    with experiment.ledger.part('preflight'):
      _, found = preflight.report(experiment.config, teacher, student, card)
  experiment.store.meta['preflight'] = found
  return found and objective.Factors(**found['factors'])


def _held_out(experiment, mesh: Mesh, make, state: programs.State, teacher: Network, judge: Network | None):
  """(synthesis, key, student) -> metrics on fresh images; None with real images and no judge."""
  if experiment.test is not None and judge is None:
    return None
  program = synthetic_images.compile_metrics(mesh, make, state.synthesis, teacher, state.student.network, judge)
  return lambda synthesis, key, student: program(
      host_replay.strip_images(synthesis), key, teacher, student, judge)


def _evaluate(experiment, look, run_key: PRNGKey, state: programs.State, done: int) -> dict[str, float]:
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
  image_steps = section.rounds * section.calls_per_round * _images_a_call(config) * method.get('num_steps', 0)
  images = (section.rounds - section.distill_after) * section.steps_per_round * section.batch_size
  return {'synthesis_image_steps': image_steps / seconds['synthesis'], 'student_images': images / seconds['student']}


def _images_a_call(config: build.Config) -> int:
  return build.tasks_of(config) * config.method.get('batch_size', 0)


def _round(
    experiment, compiled: programs.Programs, finite: non_finite.FiniteCheck, run_key: PRNGKey, teacher: Network,
    state: programs.State, index: int, reseeded: int):
  """One round: as many calls as it has, each of synthesis, and of student steps once there is enough to learn from."""
  section, learnt = experiment.config.distill, []
  for call in range(section.calls_per_round):
    key = supervised.round_key(run_key, index * section.calls_per_round + call, reseeded)
    key_synthesis, key_student = jax.random.split(key)
    began = time.perf_counter()
    synthesis, metrics = compiled.synthesize(state.synthesis, key_synthesis, teacher, state.student.network)
    called, student = time.perf_counter(), state.student
    if index >= section.distill_after:
      student, synthesis, found = compiled.distill(student, synthesis, key_student, teacher)
      learnt.append(found)
    # Both programs are under way; only now is anything waited for, unless their images are elsewhere.
    metrics = jax.tree.map(np.asarray, metrics)
    numbers = {f'synthesis_{name}': float(values[-1]) for name, values in metrics.items()}
    between = called if compiled.waits else time.perf_counter()
    jax.block_until_ready(student.step)
    experiment.ledger.add('synthesis', between - began)
    experiment.ledger.add('student', time.perf_counter() - between)
    state = programs.State(synthesis, student)
    experiment.ledger.count('synthesised', _images_a_call(experiment.config))
    with non_finite.attach_key(key):
      non_finite.check_series('synthesis', metrics, call)
      if learnt:
        non_finite.check_series('student', {'loss': learnt[-1]['losses']}, call)
        experiment.ledger.count('seen', programs.steps_per_call(experiment.config) * section.batch_size)
      finite.check((student, host_replay.strip_images(synthesis)))
  if learnt:  # `agreement` is that on real images.
    means = {name: float(np.mean([found[name] for found in learnt])) for name in learnt[0] if name != 'losses'}
    numbers |= {'loss': means['loss'], 'synthetic_agreement': means['agreement'],
                **{name: means[name] for name in ('weight', 'weighed_loss')}}
  return state, numbers
