"""Distillation without data: rounds of synthesis and of student steps."""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dfkd_jax import distill, parallel, weights
from dfkd_jax.config import build, build_method, build_optimizer
from dfkd_jax.config.records import Settings
from dfkd_jax.evaluate import synthetic_images
from dfkd_jax.jobs import noise_control, preflight, sample_images
from dfkd_jax.jobs.round import Round
from dfkd_jax.models.network import Network
from dfkd_jax.runs import init_from, non_finite, programs
from dfkd_jax.runs.loop import Experiment, Start
from dfkd_jax.runs.results import write_networks
from dfkd_jax.synth import host_replay
from dfkd_jax.synth.objective import Factors
from dfkd_jax.types import Metrics, PRNGKey, PyTree

_EVALUATIONS = 1 << 31  # with the rounds done, folded into the run's key; round numbers are below


class _Keys(NamedTuple):
  student: PRNGKey
  method: PRNGKey
  rounds: PRNGKey
  control: PRNGKey
  picture: PRNGKey


class _Trained(NamedTuple):
  """The networks that never change."""

  teacher: Network
  judge: Network | None


def run(settings: Settings, start: Start, teacher: Network | None = None) -> dict[str, Any]:
  """Distils the teacher into the student without data.

  Writes metrics.jsonl, summary.json, images.png, student.safetensors, student_best.safetensors and
  checkpoints.

  Args:
    settings: The resolved config.
    start: Folder, command and stop request.
    teacher: A network that replaces the teacher of the settings.
  """
  mesh = build.make_mesh(settings)
  keys = _Keys(*jax.random.split(jax.random.key(settings.run.seed), 5))
  with parallel.raise_on_all_processes():
    experiment = Experiment(settings, start, 'round')
    with experiment.ledger.part('setup'):
      trained, card = _load_trained(settings, experiment, teacher)
    if (summary := experiment.store.finished()) is not None:
      return summary
    with experiment.ledger.part('setup'):
      student = build.fresh_network(settings.student, keys.student)
      student = init_from.student(settings, student, experiment.store.stored)
      student = jax.tree.map(np.array, student)  # kept for the control; the run donates its copy
    factors = _choose_factors(settings, experiment, trained.teacher, student, card)
    trained = _Trained(*(network and parallel.place(mesh, network) for network in trained))
  parallel.check_same_on_all(json.dumps([experiment.store.meta['weights'], factors]),
                             'The weights of the teacher and judge')
  plan = programs.Plan(
      mesh, build_method.synthesizer(settings.method, mesh.size, factors),
      build_optimizer.optimizer(settings.optimizer, settings.distill.learning_rounds,
                                settings.distill.steps_per_round),
      settings.distill, build_method.augmentation(settings.augment),
      settings.method.num_tasks // mesh.size)
  with experiment.ledger.part('setup'):
    state = _init_state(settings, experiment, plan, trained.teacher, student, keys.method)
  with experiment.ledger.part('compile'):
    compiled, state = programs.place_and_compile(
        plan, state, *trained, buffer=settings.buffer,
        memory=parallel.memory_limit(settings.device_memory_gb))
    finite = non_finite.compile_finite_check(
        (state.student, host_replay.strip_images(state.synthesis)))
    measure = _compile_measure(settings, experiment, plan, factors, state, trained)
  advance = Round(settings.distill, compiled, finite, experiment.ledger, keys.rounds,
                  trained.teacher, settings.method.images_per_call)
  evaluate = functools.partial(_evaluate, experiment, measure, keys.rounds)
  with experiment:  # nothing is written before
    build.note_idle_devices(settings, mesh.size)
    state, done = experiment.store.begin(state, 'round', settings.distill.rounds)
    state = state.replace(synthesis=host_replay.allocate(state.synthesis))
    teacher_metrics = experiment.test and experiment.cache_teacher_predictions(trained.teacher)
    state = experiment.loop(state, done, settings.distill.rounds, advance, evaluate)
    files = write_networks(experiment.workdir, 'student', state.student.network,
                           experiment.store.best_network, settings.student)
    judged = _show_images(settings, experiment, plan, state.synthesis, trained, keys.picture)
    control = settings.control and noise_control.run(
        experiment, plan, student, trained.teacher, settings.dataset.image_shape, keys.control)
    return experiment.write_summary(
        num_devices=mesh.size, files=(*files, 'images.png'), teacher=teacher_metrics,
        control=control or None, preflight=experiment.store.meta['preflight'], images=judged,
        selection=experiment.selection, rates=_rates(settings, experiment.ledger.seconds()),
        external_prior=settings.method.numbers.get('embeddings'),
        parameters={'student': student.num_params(), 'teacher': trained.teacher.num_params()})


def _load_trained(
    settings: Settings, experiment: Experiment, teacher: Network | None
) -> tuple[_Trained, weights.Card]:
  """Loads teacher and judge; notes which weights the run stands on."""
  source = settings.teacher.source if teacher is None else None
  teacher = build.trained_network(settings.teacher) if teacher is None else teacher
  card, judge, judge_card = build.make_card(teacher, source), None, None
  if settings.judge.source is not None:
    judge = build.trained_network(settings.judge)
    judge_card = build.make_card(judge, settings.judge.source, 'judge')
  experiment.store.stands_on(
      teacher=card.sha256, judge=judge_card and judge_card.sha256,
      **init_from.digests(settings, experiment.store.stored))
  return _Trained(teacher, judge), card


def _choose_factors(
    settings: Settings, experiment: Experiment, teacher: Network, student: Network,
    card: weights.Card) -> Factors | None:
  """Returns the preflight's factors, which a resumed run keeps; None: those of the settings."""
  findings = experiment.store.stored.get('preflight')
  if settings.preflight.enabled and findings is None:
    with experiment.ledger.part('preflight'):
      findings = preflight.report(settings, teacher, student, card)
  experiment.store.meta['preflight'] = findings
  return findings and Factors(**findings['factors'])


def _init_state(
    settings: Settings, experiment: Experiment, plan: programs.Plan, teacher: Network,
    student: Network, key: PRNGKey) -> programs.State:
  """Returns the state before the first round, without the images of a buffer."""
  synthesis = programs.init(plan.make, plan.mesh, key, teacher)
  with parallel.raise_on_all_processes():
    synthesis = init_from.generator(settings, plan.mesh, synthesis, experiment.store.stored)
  return programs.State(synthesis, parallel.place(plan.mesh, distill.init(student, plan.tx)))


def _compile_measure(
    settings: Settings, experiment: Experiment, plan: programs.Plan, factors: Factors | None,
    state: programs.State, trained: _Trained) -> Callable[..., Metrics] | None:
  """Returns (synthesis, key, student) -> metrics on fresh synthetic images.

  Returns None if real images do, and no judge looks.
  """
  if experiment.test is not None and trained.judge is None:
    return None
  method = settings.method
  if 'capacity' in method.numbers:  # room for one call is enough
    method = method._replace(numbers=method.numbers | {'capacity': method.images_per_call})
  program = synthetic_images.compile_metrics(
      plan.mesh, build_method.synthesizer(method, plan.mesh.size, factors), state.synthesis,
      trained.teacher, state.student.network, trained.judge)
  return lambda synthesis, key, student: program(
      synthetic_images.without_images(synthesis), key, trained.teacher, student, trained.judge)


def _evaluate(experiment: Experiment, measure: Callable[..., Metrics] | None, key: PRNGKey,
              state: programs.State, done: int) -> dict[str, float]:
  """Evaluates the student on real images, if there are any, and on fresh synthetic ones."""
  network = state.student.network
  metrics = {} if experiment.test is None else experiment.evaluate(network)
  if measure is not None:
    with experiment.ledger.part('evaluation'):
      fresh = measure(state.synthesis, jax.random.fold_in(key, _EVALUATIONS + done), network)
      metrics |= {name: float(np.asarray(value)) for name, value in fresh.items()}
  return metrics


def _show_images(
    settings: Settings, experiment: Experiment, plan: programs.Plan, synthesis: PyTree,
    trained: _Trained, key: PRNGKey) -> dict[str, float] | None:
  """Writes images.png; returns what the judge says of the images."""
  grid, judge = settings.grid, trained.judge
  number = 4 * grid.columns * grid.rows  # so that most classes have enough
  number = max(number, sample_images.JUDGED) if judge is not None else number
  batch = sample_images.draw(plan, settings.task, synthesis, trained.teacher, key, number)
  sample_images.write_grid(experiment, grid, batch)
  return judge and sample_images.judge_images(experiment, judge, batch)


def _rates(settings: Settings, seconds: dict[str, float]) -> dict[str, float]:
  """Returns rates of the compiled programs: images times inner steps a second, images a second."""
  rounds, method = settings.distill, settings.method
  image_steps = method.total_calls * method.images_per_call * method.numbers.get('num_steps', 0)
  images = rounds.learning_rounds * rounds.steps_per_round * rounds.batch_size
  return {'synthesis_image_steps': image_steps / seconds['synthesis'],
          'student_images': images / seconds['student']}
