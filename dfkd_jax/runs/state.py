"""The state of a run in its folder: what is saved, and how a run resumes from it."""

import contextlib
import dataclasses
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np

from dfkd_jax import parallel, report
from dfkd_jax.config.records import RunSettings
from dfkd_jax.models.network import Network
from dfkd_jax.runs import config_diff
from dfkd_jax.runs import folder as run_folder
from dfkd_jax.runs.checkpoint import Checkpoints
from dfkd_jax.types import PyTree


class RunState:
  """The saved state of one run; a context manager that writes nothing before it is entered.

  `checkpoints/` holds the state after a round, with the best student so far; `control/` holds the
  state of the noise control, which follows the last round. Every checkpoint has the identity of
  its run (config, weights, settings of JAX) and the time and counts spent so far.

  Args:
    settings: The settings of the run.
    workdir: The folder; made if missing.
    ledger: Time and counts of the run.
    resume: The fields that may differ from the run in the folder, see `config_diff`.

  Attributes:
    meta: JSON values that are saved with every checkpoint.
    stored: The record of the run in the folder, from `folder.read_stored`.
    best, last: Metrics of the best and last evaluation, with their 'round'; at first empty.
    best_network: The student of `best`; None if it is not kept.
    reseeded: How often a round was repeated with other keys, by round.
  """

  def __init__(
      self, settings: RunSettings, workdir: pathlib.Path, ledger: report.Ledger,
      resume: str | None = None):
    self._began = time.perf_counter()
    self.workdir, self.ledger, self._settings, self._resume = workdir, ledger, settings, resume
    self.meta: dict[str, Any] = config_diff.run_identity(settings.config) | {
        'hash': config_diff.fingerprint(settings.config), 'changed': []}
    self.stored = run_folder.read_stored(workdir)
    self.best: dict[str, Any] = {}
    self.last: dict[str, Any] = {}
    self.best_network: Network | None = None
    self.reseeded: dict[int, int] = {}
    self._changes: dict[str, Any] = {}  # Fields that differ from the run in the folder.
    self._saved_round: int | None = None  # The round of the latest checkpoint.
    self._earlier_seconds = 0.0  # Wall time of earlier processes of this run.
    self._added: dict[str, Any] = {}  # The record that `_add_time_spent` added last.
    self._templates: tuple[PyTree, PyTree] | None = None  # Of the state, of the best student.
    self._checkpoints: Checkpoints | None = None
    self._control: Checkpoints | None = None
    self._stack = contextlib.ExitStack()

  def check_identity(self, **weights: str | None) -> None:
    """Raises ValueError if the folder holds another run, see `config_diff.config_changes`.

    Args:
      **weights: SHA-256 of the weights that this run depends on; None: there are none.
    """
    self.meta['weights'] = weights
    self._changes = config_diff.config_changes(
        self.stored, self.meta, self.workdir, self._resume)

  def finished_summary(self) -> dict[str, Any] | None:
    """Returns and prints the summary if this run has ended before."""
    summary = None if self._changes else run_folder.read_summary(self.workdir)
    if summary is not None:
      report.note('This run has finished before. To run it anew, name another workdir than '
                  f'{self.workdir}.')
      report.say(report.format_summary(summary))
    return summary

  def __enter__(self) -> 'RunState':
    with contextlib.ExitStack() as stack:
      stack.enter_context(run_folder.lock(self.workdir, self.stored))
      self._checkpoints = stack.enter_context(Checkpoints(
          self.workdir / run_folder.CHECKPOINTS, max_to_keep=self._settings.max_to_keep))
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *error) -> None:
    self._stack.__exit__(*error)

  def resume(self, state: PyTree, unit: str, total: int) -> tuple[PyTree, int]:
    """Returns the saved state and its number of rounds; of a new run `state` and 0.

    Args:
      state: The state that a new run begins with.
      unit: The name of a round, 'round' or 'epoch'.
      total: Number of rounds of the whole run.

    Raises:
      ValueError: More than `total` rounds are done, or no checkpoint can be read.
    """
    self.ledger.count('starts')
    self._templates = shapes_of((fields_of(state), {'best': student_network(state)}))
    if not self._checkpoints.all_steps():
      if (self.workdir / report.METRICS).exists():
        report.note(f'A run in {self.workdir} had saved nothing; its {report.METRICS} starts anew.')
      report.note(f'Results go to {self.workdir}')
      return state, 0
    state, meta = self._restore(state)
    done = meta['done']
    if done > total:
      raise ValueError(f'{self.workdir} holds {done} {unit}s, more than the requested {total}.')
    for reason in self._checkpoints.damaged.values():
      report.note(f'{reason.rstrip(".")}. It is set aside. The checkpoint before it is used.')
    report.note(f'Resuming in {self.workdir} after {unit} {done}')
    self.reseeded = {int(index): times for index, times in meta['reseeded'].items()}
    self._add_time_spent(meta)
    self.meta['changed'] = meta['changed']
    # This checkpoint may be older than `stored`, so that more fields differ.
    if fields := config_diff.differing_fields(meta, self.meta):
      self.meta['changed'] = [*meta['changed'], {'after': done, 'fields': fields}]
    if self._changes:
      run_folder.rename_summary(self.workdir, done)
    return state, done

  def restore_latest(self, state: PyTree) -> tuple[PyTree, int]:
    """Returns the latest saved state and its rounds. The arrays of `state` may be deleted."""
    state, meta = self._restore(state)
    return state, meta['done']

  def _restore(self, state: PyTree) -> tuple[PyTree, dict[str, Any]]:
    template, best = self._templates
    with self.ledger.part('checkpoint'):
      parts, meta = self._checkpoints.restore(template, optional=best)
    best_network = parts.pop('best', None)
    self.best_network = best_network if self._settings.keep_best else None
    self.best, self.last, self._saved_round = meta['best'], meta['last'], meta['done']
    return state.replace(**parts), meta

  def record_metrics(
      self, metrics: dict[str, float], done: int, state: PyTree, selection: str) -> None:
    """Records the metrics after `done` rounds, and the student if it has the best `selection`."""
    self.last = metrics | {'round': done}
    if self.last[selection] > self.best.get(selection, -1.0):
      self.best = self.last
      if self._settings.keep_best:  # A copy, since the state will be donated.
        self.best_network = jax.tree.map(
            lambda leaf: jax.device_put(leaf, leaf.sharding, may_alias=False),
            student_network(state))

  def save(self, done: int, state: PyTree) -> None:
    """Starts to write a checkpoint after `done` rounds, unless there is one."""
    if done != self._saved_round:
      best = {} if self.best_network is None else {'best': self.best_network}
      self._save(self._checkpoints, done, fields_of(state) | best, {
          'best': self.best, 'last': self.last,
          'reseeded': {str(index): times for index, times in self.reseeded.items()}})
      self._saved_round = done

  def _save(self, checkpoints: Checkpoints, done: int, parts: PyTree, more: dict[str, Any]) -> None:
    with self.ledger.part('checkpoint'):
      spent = {'ledger': self.ledger.state(), 'wall_seconds': self.wall_seconds()}
      checkpoints.save(done, parts, self.meta | spent | {'done': done} | more)

  def wait(self) -> None:
    """Waits until everything is written."""
    with self.ledger.part('checkpoint'):
      for checkpoints in filter(None, (self._checkpoints, self._control)):
        checkpoints.wait()

  def latest(self) -> int | None:
    """Returns the rounds of the latest checkpoint; None if there is none."""
    return self._checkpoints.latest()

  def wall_seconds(self) -> float:
    """Returns the wall time of the run, without the time between its processes."""
    return self._earlier_seconds + time.perf_counter() - self._began

  def _add_time_spent(self, meta: dict[str, Any]) -> None:
    """Adds the time and counts of a restored checkpoint, except for those added before."""
    self.ledger.load(meta['ledger'], self._added.get('ledger'))
    self._earlier_seconds += meta['wall_seconds'] - self._added.get('wall_seconds', 0.0)
    self._added = meta

  def resume_control(self, state: PyTree) -> tuple[PyTree, int]:
    """Returns the saved state of the noise control and its number of steps, or `state` and 0.

    Deletes checkpoints of another run's control and those that cannot be read: to start the
    control anew costs only time.
    """
    folder = self.workdir / run_folder.CONTROL
    self._open_control(folder)
    if not self._control.all_steps():
      return state, 0
    try:
      with self.ledger.part('checkpoint'):
        parts, meta = self._control.restore(fields_of(state))
      if not config_diff.differing_fields(meta, self.meta):
        self._add_time_spent(meta)
        return state.replace(**parts), meta['done']
      problem = f'{folder} is of another run.'
    except ValueError as error:
      problem = f'{str(error).rstrip(".")}.'
    report.note(f'{problem} The control starts anew.')
    self.remove_control()
    self._open_control(folder)
    if self._control.all_steps():
      raise ValueError(f'Cannot remove {folder}, which this run cannot use.')
    return state, 0

  def _open_control(self, folder: pathlib.Path) -> None:
    self._control = self._stack.enter_context(Checkpoints(folder, max_to_keep=1))

  def save_control(self, done: int, state: PyTree) -> None:
    """Starts to write a checkpoint of the noise control after `done` steps."""
    self._save(self._control, done, fields_of(state), {})

  def remove_control(self) -> None:
    """Deletes the checkpoints of the noise control, if there are any."""
    if self._control is not None:
      self._control.close()
    with parallel.raise_on_all_processes():
      if parallel.is_first():
        shutil.rmtree(self.workdir / run_folder.CONTROL, ignore_errors=True)


def student_network(state: PyTree) -> Network:
  """Returns the student in the state of a distillation or of a training."""
  return getattr(state, 'student', state).network


def fields_of(state: PyTree) -> dict[str, PyTree]:
  """Returns the fields of a dataclass by name."""
  return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def shapes_of(tree: PyTree) -> PyTree:
  """Returns a template for `Checkpoints.restore` that keeps no array of the tree alive.

  NumPy arrays become zeros, which take no memory until they are written.
  """
  return jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray)
      else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
