"""Distillation without data: rounds of synthesis and of student steps."""

import json
from typing import Any, NamedTuple

import jax
import numpy as np

from dfkd_jax import augment, distill, parallel
from dfkd_jax.config import build, build_method
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
from dfkd_jax.types import PRNGKey

_EVALUATIONS = 1 << 31  # plus the rounds done, folded into the run's key; rounds are below


class _Keys(NamedTuple):
  student: PRNGKey
  method: PRNGKey
  rounds: PRNGKey
  control: PRNGKey
  picture: PRNGKey


def run(settings: Settings, start: Start, teacher: Network | None = None) -> dict[str, Any]:
  """Distils the teacher into the student without data.

  Writes metrics.jsonl, summary.json, images.png, student.safetensors, student_best.safetensors and
  checkpoints.

  Args:
    settings: The resolved config.
    start: Folder, command and stop request.
    teacher: A network that replaces the teacher of the settings.
  """
  with parallel.raise_on_all_processes():
    job = _Distillation(settings, start)
    job.load_networks(teacher)
    if (summary := job.store.finished_summary()) is not None:
      return summary
    job.init_student()
    job.choose_factors()
  job.make_method()
  state = job.compile(job.init_state())
  with job.experiment:  # nothing is written before
    state = job.run_rounds(state)
    return job.report(state)


class _Distillation:
  """The stages of a distillation, in order; each sets what later ones need."""

  def __init__(self, settings: Settings, start: Start):
    self.settings, self.rounds, self.method = settings, settings.distill, settings.method
    self.mesh = build.make_mesh(settings)
    self.keys = _Keys(*jax.random.split(jax.random.key(settings.run.seed), 5))
    self.experiment = Experiment(settings, start, 'round')
    self.ledger, self.store = self.experiment.ledger, self.experiment.store

  def load_networks(self, teacher: Network | None) -> None:
    """Loads teacher and judge; notes which weights the run stands on."""
    settings, source = self.settings, None
    with self.ledger.part('setup'):
      if teacher is None:
        teacher, source = build.trained_network(settings.teacher), settings.teacher.source
      self.teacher, self.card = teacher, build.make_card(teacher, source)
      self.judge, judge_card = None, None
      if settings.judge.source is not None:
        self.judge = build.trained_network(settings.judge)
        judge_card = build.make_card(self.judge, settings.judge.source, 'judge')
      sources, stored = settings.init_from, self.store.stored
      self.unread = init_from.unread_sources(sources, stored, settings.control)
      self.store.check_identity(
          teacher=self.card.sha256, judge=judge_card and judge_card.sha256,
          **init_from.source_digests(sources, self.unread, stored))

  def init_student(self) -> None:
    """Makes the student on the host: the control needs it after the run has donated its copy."""
    with self.ledger.part('setup'):
      student = build.fresh_network(self.settings.student, self.keys.student)
      student = init_from.load_student(
          student, self.unread.student, self.settings.dataset.image_shape)
      self.student = jax.tree.map(np.array, student)

  def choose_factors(self) -> None:
    """Takes the preflight's factors, which a resumed run keeps; None: the settings' own."""
    findings = self.store.stored.get('preflight')
    if self.settings.preflight.enabled and findings is None:
      with self.ledger.part('preflight'):
        findings = preflight.report(self.settings, self.teacher, self.student, self.card)
    self.store.meta['preflight'] = findings
    self.factors = findings and Factors(**findings['factors'])

  def make_method(self) -> None:
    """Plans the programs; places the networks that never change."""
    parallel.check_same_on_all(json.dumps([self.store.meta['weights'], self.factors]),
                               'The weights of the teacher and judge')
    rounds, settings = self.rounds, self.settings
    self.teacher, self.judge = (
        network and parallel.place(self.mesh, network) for network in (self.teacher, self.judge))
    self.plan = programs.Plan(
        self.mesh, build_method.synthesizer(self.method, self.mesh.size, self.factors),
        build.optimizer(
            settings.optimizer, rounds.learning_rounds, rounds.steps_per_round),
        rounds, augment.create(**settings.augment), self.method.num_tasks // self.mesh.size)

  def init_state(self) -> programs.State:
    """Returns the state before the first round, without the images of a buffer."""
    with self.ledger.part('setup'):
      synthesis = programs.init(self.plan.make, self.mesh, self.keys.method, self.teacher)
      with parallel.raise_on_all_processes():
        synthesis = init_from.load_generator(
            self.plan.make(None), synthesis, self.unread.generator, self.mesh)
      student = distill.init(self.student, self.plan.tx)
      return programs.State(synthesis, parallel.place(self.mesh, student))

  def compile(self, state: programs.State) -> programs.State:
    """Compiles all programs; returns the state where they take it."""
    with self.ledger.part('compile'):
      compiled, state = programs.place_and_compile(
          self.plan, state, self.teacher, self.judge, buffer=self.settings.buffer,
          memory=parallel.memory_limit(self.settings.device_memory_gb))
      finite = non_finite.compile_finite_check(
          (state.student, host_replay.strip_images(state.synthesis)))
      self.advance = Round(self.rounds, compiled, finite, self.ledger, self.keys.rounds,
                           self.teacher, self.method.images_per_call)
      self.measure = None
      if self.experiment.test is None or self.judge is not None:
        self.measure = synthetic_images.compile_metrics(
            self.mesh, self.plan.make, state.synthesis, self.teacher, state.student.network,
            self.judge)
    return state

  def run_rounds(self, state: programs.State) -> programs.State:
    """Runs all rounds that are not done."""
    build.note_idle_devices(self.settings, self.mesh.size)
    state, done = self.store.resume(state, 'round', self.rounds.rounds)
    state = state.replace(synthesis=host_replay.allocate(state.synthesis))
    self.teacher_metrics = None
    if self.experiment.test is not None:
      self.teacher_metrics = self.experiment.cache_teacher_predictions(self.teacher)
    return self.experiment.loop(state, done, self.rounds.rounds, self.advance, self.evaluate)

  def evaluate(self, state: programs.State, done: int) -> dict[str, float]:
    """Evaluates the student on real images, if there are any, and on fresh synthetic ones."""
    network, metrics = state.student.network, {}
    if self.experiment.test is not None:
      metrics = self.experiment.evaluate(network)
    if self.measure is not None:
      with self.ledger.part('evaluation'):
        fresh = self.measure(
            host_replay.strip_images(state.synthesis),
            jax.random.fold_in(self.keys.rounds, _EVALUATIONS + done), self.teacher, network,
            self.judge)
        metrics |= {name: float(np.asarray(value)) for name, value in fresh.items()}
    return metrics

  def report(self, state: programs.State) -> dict[str, Any]:
    """Writes networks, images and summary; trains the control."""
    settings, experiment = self.settings, self.experiment
    files = write_networks(experiment.workdir, 'student', state.student.network,
                           self.store.best_network, settings.student)
    images = sample_images.show(experiment, self.plan, settings.grid, state.synthesis,
                                self.teacher, self.judge, self.keys.picture)
    control = None
    if settings.control:
      control = noise_control.run(experiment, self.plan, self.student, self.teacher,
                                  settings.dataset.image_shape, self.keys.control)
    return experiment.write_summary(
        num_devices=self.mesh.size, files=(*files, 'images.png'), teacher=self.teacher_metrics,
        control=control, preflight=self.store.meta['preflight'], images=images,
        selection=experiment.selection, rates=_rates(settings, self.ledger.seconds()),
        external_prior=self.method.numbers.get('embeddings'),
        parameters={'student': self.student.num_params(), 'teacher': self.teacher.num_params()})


def _rates(settings: Settings, seconds: dict[str, float]) -> dict[str, float]:
  """Returns rates of the compiled programs: images times inner steps a second, images a second."""
  rounds, method = settings.distill, settings.method
  image_steps = rounds.total_calls * method.images_per_call * method.numbers.get('num_steps', 0)
  images = rounds.learning_rounds * rounds.steps_per_round * rounds.batch_size
  return {'synthesis_image_steps': image_steps / seconds['synthesis'],
          'student_images': images / seconds['student']}
