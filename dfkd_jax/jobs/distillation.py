"""Distillation without data: rounds of synthesis and of student steps."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax import augment, distill, parallel
from dfkd_jax.config import build, build_method
from dfkd_jax.config.records import Settings
from dfkd_jax.evaluate import synthetic_images
from dfkd_jax.jobs import noise_control, preflight, sample_images, student_head
from dfkd_jax.models.network import Network
from dfkd_jax.runs import init_from, non_finite, programs
from dfkd_jax.runs.loop import Experiment, Start, round_key
from dfkd_jax.runs.programs import State
from dfkd_jax.synth import host_replay
from dfkd_jax.synth.objective import Factors
from dfkd_jax.types import Metrics, PRNGKey


def run(settings: Settings, start: Start, teacher: Network | None = None) -> dict[str, Any]:
  """Distils the teacher of the settings, or a network in its place, into the student without data.

  Writes metrics.jsonl, summary.json, images.png, student*.safetensors and checkpoints.
  """
  with parallel.raise_on_all_processes():
    job = _Distillation(settings, start, teacher)
    if (summary := job.store.finished_summary()) is not None:
      return summary
    job.prepare_student()
  state = job.compile(job.init_state())
  with job.experiment.open():  # nothing is written before
    return job.report(job.run_rounds(state))


class _Distillation:
  """The stages of a distillation, in order; each sets what later ones need."""

  def __init__(self, settings: Settings, start: Start, teacher: Network | None):
    self.settings, self.rounds, self.method = settings, settings.distill, settings.method
    keys = jax.random.split(jax.random.key(settings.run.seed), 5)
    self.student_key, self.method_key, self.run_key, self.control_key, self.picture_key = keys
    self.experiment = experiment = Experiment(settings, start, 'round')
    self.mesh, self.ledger, self.store = experiment.mesh, experiment.ledger, experiment.store
    source, judge_digest = None, None
    with self.ledger.part('setup'):
      if teacher is None:
        teacher, source = build.trained_network(settings.teacher), settings.teacher.source
      else:
        logits = jax.eval_shape(teacher, jnp.zeros((1, *settings.dataset.image_shape))).logits
        build.check_kind(
            logits.ndim, settings.student.task, 'teacher', type(teacher.module).__name__)
      self.teacher, self.judge, self.card = teacher, None, build.make_card(teacher, source)
      if settings.judge.source is not None:
        self.judge = build.trained_network(settings.judge)
        judge_digest = build.make_card(self.judge, settings.judge.source, 'judge').sha256
      self.unread = self.store.check_identity(settings, self.card.sha256, judge=judge_digest)

  def prepare_student(self) -> None:
    """Makes the student, and takes the factors of the preflight, which a resumed run keeps."""
    settings, findings = self.settings, self.store.stored.get('preflight')
    with self.ledger.part('setup'):
      student = init_from.load_student(settings.student, self.student_key, self.unread.student)
      # On the host: the control needs it after the run has donated its copy.
      self.student = jax.tree.map(np.array, student)
    if settings.preflight.enabled and findings is None:
      with self.ledger.part('preflight'):
        test = self.experiment.test
        findings = preflight.report(settings, self.teacher, self.student, self.card,
                                    None if test is None else test.images)
    self.store.meta['preflight'] = findings
    self.factors = findings and Factors(**findings['factors'])  # None: the settings' own

  def init_state(self) -> State:
    """Plans the programs; returns the state before the first round, without a buffer's images."""
    identity = str([self.store.meta['weights'], self.factors])
    parallel.check_same_on_all(identity, 'The weights of the teacher and judge')
    rounds, settings = self.rounds, self.settings
    self.teacher, self.judge = (
        network and parallel.place(self.mesh, network) for network in (self.teacher, self.judge))
    make = build_method.synthesizer(self.method, self.mesh.size, self.factors)
    tx = build.optimizer(
        settings.optimizer, rounds.learning_rounds, rounds.steps_per_round,
        student_head.replaced_layers(settings.head, self.student))
    self.plan = programs.Plan(self.mesh, make, tx, rounds, augment.create(**settings.augment),
                              self.method.num_tasks // self.mesh.size)
    with self.ledger.part('setup'):
      synthesis = programs.init(make, self.mesh, self.method_key, self.teacher)
      with parallel.raise_on_all_processes():
        synthesis = init_from.load_generator(
            make(None), synthesis, self.unread.generator, self.mesh)
      return State(synthesis, parallel.place(self.mesh, distill.init(self.student, tx)))

  def compile(self, state: State) -> State:
    """Compiles all programs; returns the state where they take it."""
    with self.ledger.part('compile'):
      self.programs, state = programs.place_and_compile(
          self.plan, state, self.teacher, self.judge, buffer=self.settings.buffer,
          memory=parallel.memory_limit(self.settings.device_memory_gb))
      self.check_state = non_finite.compile_check(
          (state.student, host_replay.strip_images(state.synthesis)))
      self.measure = None
      if self.experiment.test is None or self.judge is not None:
        self.measure = synthetic_images.compile_metrics(
            self.mesh, self.plan.make, state.synthesis, self.teacher, state.student.network,
            self.judge)
    return state

  def run_rounds(self, state: State) -> State:
    """Runs all rounds that are not done."""
    build.note_idle_devices(self.settings, self.mesh.size)
    state, done = self.store.resume(state, 'round', self.rounds.rounds)
    state = state.replace(synthesis=host_replay.allocate(state.synthesis))
    if self.experiment.test is not None:
      self.experiment.cache_teacher_predictions(self.teacher)
    events = student_head.events(self.experiment, self.plan, self.settings, self.teacher)
    return self.experiment.loop(
        state, done, self.rounds.rounds, self.advance, self.evaluate, events)

  def advance(self, state: State, index: int, reseeded: int) -> tuple[State, dict[str, float]]:
    """Runs a round: calls of the method, each followed by its share of the student's steps."""
    learnt, calls = [], self.rounds.calls_per_round
    for call in range(calls):
      key = round_key(self.run_key, index * calls + call, reseeded)
      state, synthesised, learnt_now = self._call(state, key, index >= self.rounds.distill_after)
      non_finite.check_series('synthesis', synthesised, key, call)
      if learnt_now is not None:
        non_finite.check_series('student', {'loss': learnt_now['losses']}, key, call)
        learnt.append(learnt_now)
      self.check_state((state.student, host_replay.strip_images(state.synthesis)), key)
    numbers = {f'synthesis_{name}': float(values[-1]) for name, values in synthesised.items()}
    if learnt:
      mean = lambda name: float(np.mean([metrics[name] for metrics in learnt]))
      numbers |= {name: mean(name) for name in ('loss', 'weight', 'weighed_loss')}
      numbers['synthetic_agreement'] = mean('agreement')  # `agreement` is on real images
    return state, numbers

  def _call(
      self, state: State, key: PRNGKey, learns: bool) -> tuple[State, Metrics, Metrics | None]:
    """Starts both programs before it waits for either, and counts the time of each."""
    key_synthesis, key_student = jax.random.split(key)
    student, learnt, began = state.student, None, time.perf_counter()
    synthesis, synthesised = self.programs.synthesize(
        state.synthesis, key_synthesis, self.teacher, student.network)
    called = time.perf_counter()
    if learns:
      student, synthesis, learnt = self.programs.distill(
          student, synthesis, key_student, self.teacher)
      self.ledger.count('seen', self.rounds.steps_per_call * self.rounds.batch_size)
    synthesised = jax.tree.map(np.asarray, synthesised)
    between = called if self.programs.waits else time.perf_counter()
    jax.block_until_ready(student.step)
    self.ledger.add('synthesis', between - began)
    self.ledger.add('student', time.perf_counter() - between)
    self.ledger.count('synthesised', self.method.images_per_call)
    return State(synthesis, student), synthesised, learnt

  def evaluate(self, state: State, done: int) -> dict[str, float]:
    """Evaluates the student on real images, if there are any, and on fresh synthetic ones."""
    network = state.student.network
    metrics = {} if self.experiment.test is None else self.experiment.evaluate(network)
    if self.measure is not None:
      with self.ledger.part('evaluation'):
        key = jax.random.fold_in(self.run_key, (1 << 31) + done)  # above those of all rounds
        fresh = self.measure(host_replay.strip_images(state.synthesis), key, self.teacher, network,
                             self.judge)
        metrics |= {name: float(np.asarray(value)) for name, value in fresh.items()}
    return metrics

  def report(self, state: State) -> dict[str, Any]:
    """Writes networks, images and summary; trains the control."""
    settings, experiment = self.settings, self.experiment
    files = experiment.write_networks('student', state.student.network, settings.student)
    images = sample_images.show(experiment, self.plan, settings.grid, state.synthesis,
                                self.teacher, state.student.network, self.judge,
                                self.picture_key)
    if experiment.test is not None and settings.task.label_axes:
      networks = {'teacher': self.teacher, 'student': state.student.network}
      sample_images.show_test_images(experiment, networks, settings.grid.columns)
      files += ('test_images.png',)
    control = None
    if settings.control:
      control = noise_control.run(experiment, self.plan, self.student, self.teacher,
                                  self.method.generator.image_shape, self.control_key)
    # Rates of the compiled programs: images times inner steps a second, images a second.
    seconds, method, rounds = self.ledger.seconds(), self.method, self.rounds
    image_steps = rounds.total_calls * method.images_per_call * method.numbers.get('num_steps', 0)
    images_seen = rounds.learning_rounds * rounds.steps_per_round * rounds.batch_size
    rates = {'synthesis_image_steps': image_steps / seconds['synthesis'],
             'student_images': images_seen / seconds['student']}
    return experiment.write_summary(
        (*files, 'images.png'), control=control, preflight=self.store.meta['preflight'],
        head=self.store.meta['head'],
        images=images, selection=experiment.selection, rates=rates,
        external_prior=method.numbers.get('embeddings'),
        parameters={'student': self.student.num_params(), 'teacher': self.teacher.num_params()})
