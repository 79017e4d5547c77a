"""A round of a distillation: synthesis, then student steps."""

import time
from typing import NamedTuple

import jax
import numpy as np

from dfkd_jax import report
from dfkd_jax.config.records import Distill
from dfkd_jax.models.network import Network
from dfkd_jax.runs import non_finite
from dfkd_jax.runs.programs import Programs, State
from dfkd_jax.synth import host_replay
from dfkd_jax.types import Metrics, PRNGKey


def round_key(run_key: PRNGKey, index: int, reseeded: int) -> PRNGKey:
  """Returns the key of a round or call; each repetition has another."""
  key = jax.random.fold_in(run_key, index)
  return jax.random.fold_in(key, reseeded) if reseeded else key


class Round(NamedTuple):
  """Runs a round: calls of the method, each followed by its share of the student's steps."""

  rounds: Distill
  programs: Programs
  finite: non_finite.FiniteCheck
  ledger: report.Ledger
  key: PRNGKey
  teacher: Network
  images_per_call: int

  def __call__(
      self, state: State, index: int, reseeded: int
  ) -> tuple[State, dict[str, float]]:
    """Returns the state after the round, and its numbers."""
    learnt = []
    for call in range(self.rounds.calls_per_round):
      key = round_key(self.key, index * self.rounds.calls_per_round + call, reseeded)
      state, synthesised, learnt_now = self._call(state, key, index >= self.rounds.distill_after)
      with non_finite.attach_key(key):
        non_finite.check_series('synthesis', synthesised, call)
        if learnt_now is not None:
          non_finite.check_series('student', {'loss': learnt_now['losses']}, call)
          learnt.append(learnt_now)
        self.finite.check((state.student, host_replay.strip_images(state.synthesis)))
    numbers = {f'synthesis_{name}': float(values[-1]) for name, values in synthesised.items()}
    if learnt:
      mean = lambda name: float(np.mean([metrics[name] for metrics in learnt]))
      numbers |= {name: mean(name) for name in ('loss', 'weight', 'weighed_loss')}
      numbers['synthetic_agreement'] = mean('agreement')  # `agreement` is on real images
    return state, numbers

  def _call(
      self, state: State, key: PRNGKey, learns: bool
  ) -> tuple[State, Metrics, Metrics | None]:
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
    self.ledger.count('synthesised', self.images_per_call)
    return State(synthesis, student), synthesised, learnt
