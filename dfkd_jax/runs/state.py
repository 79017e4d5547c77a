"""The state of a run in its folder: saving it, and resuming from it."""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dfkd_jax import parallel, report
from dfkd_jax.config.records import InitFrom, RunSettings, Settings
from dfkd_jax.models.network import Network
from dfkd_jax.runs import config_diff, init_from
from dfkd_jax.runs import folder as run_folder
from dfkd_jax.runs.checkpoint import Checkpoints
from dfkd_jax.types import PyTree


class RunState:
  """The saved state of one run. Writes nothing before `open`.

  `checkpoints/` holds the state after a round, with the best student so far; `control/` holds the
  state of the noise control, which follows the last round. Every checkpoint has the identity of
  its run (config, weights, settings of JAX) and the time and counts spent so far.
  """

  def __init__(self, settings: RunSettings, workdir: pathlib.Path, ledger: report.Ledger,
               resume: str | None = None):
    self._began = time.perf_counter()
    self.workdir, self.ledger, self._settings, self._resume = workdir, ledger, settings, resume
    # JSON values that are saved with every checkpoint.
    self.meta: dict[str, Any] = config_diff.run_identity(settings.config) | {
        'hash': config_diff.fingerprint(settings.config), 'changed': []}
    self.stored = run_folder.read_stored(workdir)  # the record of the run in the folder
    self.best: dict[str, Any] = {}  # metrics of the best evaluation, with their 'round'
    self.last: dict[str, Any] = {}  # likewise of the last one
    self.best_network: Network | None = None  # the student of `best`, if it is kept
    self.reseeded: dict[int, int] = {}  # how often a round was repeated with other keys
    self._changes: dict[str, Any] = {}  # fields that differ from the run in the folder
    self._saved_round: int | None = None  # the round of the latest checkpoint
    self._earlier_seconds = 0.0  # wall time of earlier processes of this run
    self._added: dict[str, Any] = {}  # the record that `_add_time_spent` added last
    self._control: Checkpoints | None = None

  def check_identity(
      self, settings: Settings, teacher: str | None, **others: str | None) -> InitFrom:
    """Records the SHA-256 of all weights that this run depends on, None where there are none.

    Returns the sources of `init_from` to read. Raises ValueError if the folder holds another run.
    """
    unread = init_from.unread_sources(settings.init_from, self.stored, settings.control)
    self.meta['weights'] = {'teacher': teacher, **others, **init_from.source_digests(
        settings.init_from, unread, self.stored)}
    self._changes = config_diff.config_changes(self.stored, self.meta, self.workdir, self._resume)
    return unread

  def finished_summary(self) -> dict[str, Any] | None:
    """Returns and prints the summary if this run has ended before."""
    if self._changes or 'student' not in self.stored:
      return None
    report.note(
        f'This run has finished before. To run it anew, name another workdir than {self.workdir}.')
    report.say(report.format_summary(self.stored))
    return self.stored

  @contextlib.contextmanager
  def open(self) -> Iterator[None]:
    """Locks the folder and opens its checkpoints."""
    with contextlib.ExitStack() as self._stack:
      self._stack.enter_context(run_folder.lock(self.workdir, self.stored))
      self.checkpoints = self._stack.enter_context(Checkpoints(
          self.workdir / run_folder.CHECKPOINTS, max_to_keep=self._settings.max_to_keep))
      yield

  def resume(self, state: PyTree, unit: str, total: int) -> tuple[PyTree, int]:
    """Returns the saved state and its number of rounds; for a new run `state` and 0.

    Raises ValueError if more than `total` rounds are done, or no checkpoint can be read.
    """
    self.ledger.count('starts')
    # Shapes keep no array alive; NumPy's zeros take no memory until they are written.
    self._templates = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray)
        else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        (vars(state), {'best': getattr(state, 'student', state).network}))
    if not self.checkpoints.all_steps():
      if (self.workdir / report.METRICS).exists():
        report.note(f'A run in {self.workdir} had saved nothing; its {report.METRICS} starts anew.')
      report.note(f'Results go to {self.workdir}')
      return state, 0
    state, meta = self.restore(state)
    done = meta['done']
    if done > total:
      raise ValueError(f'{self.workdir} holds {done} {unit}s, more than the requested {total}.')
    for reason in self.checkpoints.damaged.values():
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

  def restore(self, state: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Returns the latest saved state and its meta data. The arrays of `state` may be deleted."""
    template, best = self._templates
    with self.ledger.part('checkpoint'):
      parts, meta = self.checkpoints.restore(template, optional=best)
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
        network = getattr(state, 'student', state).network
        self.best_network = jax.tree.map(
            lambda leaf: jax.device_put(leaf, leaf.sharding, may_alias=False), network)

  def save(self, done: int, state: PyTree) -> None:
    """Starts to write a checkpoint after `done` rounds, unless there is one."""
    if done != self._saved_round:
      best = {} if self.best_network is None else {'best': self.best_network}
      reseeded = {str(index): times for index, times in self.reseeded.items()}
      self._save(self.checkpoints, done, vars(state) | best,
                 {'best': self.best, 'last': self.last, 'reseeded': reseeded})
      self._saved_round = done

  def _save(self, checkpoints: Checkpoints, done: int, parts: PyTree, more: dict[str, Any]) -> None:
    with self.ledger.part('checkpoint'):
      spent = {'ledger': self.ledger.state(), 'wall_seconds': self.wall_seconds()}
      checkpoints.save(done, parts, self.meta | spent | {'done': done} | more)

  def wait(self) -> None:
    """Waits until everything is written."""
    with self.ledger.part('checkpoint'):
      for checkpoints in filter(None, (self.checkpoints, self._control)):
        checkpoints.wait()

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

    Deletes checkpoints of another run, and unreadable ones: a new start costs only time.
    """
    folder = self.workdir / run_folder.CONTROL
    self._control = self._stack.enter_context(Checkpoints(folder, max_to_keep=1))
    if not self._control.all_steps():
      return state, 0
    try:
      with self.ledger.part('checkpoint'):
        parts, meta = self._control.restore(vars(state))
      if not config_diff.differing_fields(meta, self.meta):
        self._add_time_spent(meta)
        return state.replace(**parts), meta['done']
      report.note(f'{folder} is of another run. The control starts anew.')
    except ValueError as error:
      report.note(f'{str(error).rstrip(".")}. The control starts anew.')
    self.remove_control()
    self._control = self._stack.enter_context(Checkpoints(folder, max_to_keep=1))
    if self._control.all_steps():
      raise ValueError(f'Cannot remove {folder}, which is of another run. Remove it by hand.')
    return state, 0

  def save_control(self, done: int, state: PyTree) -> None:
    """Starts to write a checkpoint of the noise control after `done` steps."""
    self._save(self._control, done, vars(state), {})

  def remove_control(self) -> None:
    """Deletes the checkpoints of the noise control, if there are any."""
    if self._control is not None:
      self._control.close()
    with parallel.raise_on_all_processes():
      if parallel.is_first():
        shutil.rmtree(self.workdir / run_folder.CONTROL, ignore_errors=True)
