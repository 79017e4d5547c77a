"""What a run keeps in its folder: the state of its checkpoints, the best student, and what it must know to go on."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
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
from dfkd_jax.runs.checkpoint_format import config_hash
from dfkd_jax.types import PyTree


class RunState:
  """The keeping of one run; a context manager, and nothing is written before it is entered.

  Args:
    settings: Of the run; its config is kept beside the checkpoints, and compared when the run goes on.
    workdir: Made if missing.
    ledger: Of the run, kept too.
    resume: In what a run that is there may go on with another config, see `run_folder.changed`.

  Raises:
    ValueError: The folder cannot be written, or holds a run of another config.
  """

  def __init__(self, settings: RunSettings, workdir: pathlib.Path, ledger: report.Ledger, resume: str | None = None):
    self._began = time.perf_counter()
    self.workdir, self.ledger, self._resume = workdir, ledger, resume
    self._settings = settings
    self.meta: dict[str, Any] = {
        'config': settings.config, 'hash': fingerprint(settings.config), 'changed': []}
    run_folder.check_place(workdir)
    self.stored = run_folder.read_stored(workdir)  # Of the run that is there.
    self._changed = config_diff.config_changes(self.stored, self.meta['config'], workdir, resume)
    self.best: dict[str, Any] = {}
    self.last: dict[str, Any] = {}
    self.best_network: Network | None = None
    self.reseeded: dict[int, int] = {}  # Rounds that were done again, and how often.
    self._saved: int | None = None  # Rounds in the latest checkpoint.
    self._wall = 0.0  # Seconds of the processes that this one goes on from.
    self._taken: dict[str, Any] | None = None  # What was spent by these.
    self._template: PyTree = None
    self._checkpoints: Checkpoints | None = None
    self._stack = contextlib.ExitStack()

  def stands_on(self, **weights: str | None) -> None:
    """Notes which weights the run stands on, by their SHA-256; None: there are none.

    Raises:
      ValueError: The folder holds a run that stands on others.
    """
    there = self.stored.get('weights', weights)
    for which, digest in weights.items():
      field = which if '.' in which else f'{which}.source'
      if there.get(which) == digest:
        continue
      if not config_diff.is_forced(self._resume, field):
        before, now = (f'of SHA-256 {of[:16]}' if of else 'none' for of in (there.get(which), digest))
        raise ValueError(f'{self.workdir} holds a run with another {which}, {before} there, {now} here. '
                         f'Name another --workdir, or go on with --resume={config_diff.FORCE}:{field}.')
      self._changed[f'weights.{which}'] = {'there': there.get(which), 'here': digest}
      config_diff.check_goes_on(self.workdir)
    self.meta['weights'] = weights

  def finished(self) -> dict[str, Any] | None:
    """The summary, printed again, if this run has come to its end before."""
    found = None if self._changed else run_folder.read_summary(self.workdir)
    if found is not None:
      report.note(f'This run has finished before. To run it anew, name another workdir than {self.workdir}.')
      report.say(report.format_summary(found))
    return found

  def __enter__(self) -> 'RunState':
    with contextlib.ExitStack() as stack:
      stack.enter_context(run_folder.lock(self.workdir, self.stored))
      self._checkpoints = stack.enter_context(
          Checkpoints(self.workdir / 'checkpoints', max_to_keep=self._settings.max_to_keep))
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *error) -> None:
    self._stack.__exit__(*error)

  def begin(self, state: PyTree, unit: str, total: int) -> tuple[PyTree, int]:
    """The state where the run stopped, and how many rounds are done; else the state given, and 0.

    Args:
      state: To begin with.
      unit: What is counted, 'round' or 'epoch'.
      total: So many are wanted in all.

    Raises:
      ValueError: More are done than are wanted, or no checkpoint can be read.
    """
    self.ledger.count('starts')
    self._template = shapes_of(fields_of(state)), shapes_of(network_of(state))
    if not self._checkpoints.any():
      if (self.workdir / report.METRICS).exists():
        report.note(f'A run in {self.workdir} had saved nothing; its {report.METRICS} is begun anew.')
      report.note(f'Results go to {self.workdir}')
      return state, 0
    state, meta = self._restored(state)
    if meta['done'] > total:
      raise ValueError(f'{self.workdir} holds {meta["done"]} {unit}s, more than the {total} that are wanted.')
    for reason in self._checkpoints.damaged.values():
      report.note(f'{reason.rstrip(".")}. It is set aside, and the checkpoint before it taken.')
    self.reseeded = {int(of): times for of, times in meta['reseeded'].items()}
    self._take(meta)
    report.note(f'Going on in {self.workdir} after {unit} {meta["done"]}')
    self.meta['changed'] = meta['changed']
    # Of the checkpoint that was read, which may be older than what the folder had been judged by.
    if fields := config_diff.differing_fields(meta, self.meta):
      self.meta['changed'] = [*meta['changed'], {'after': meta['done'], 'fields': fields}]
    if self._changed:
      self._set_aside(meta['done'])
    return state, meta['done']

  def _take(self, record: dict[str, Any], but: dict[str, Any] | None = None) -> None:
    """Adds the time and counts of the processes that this one goes on from, `but` those that were added before."""
    self.ledger.load(record['ledger'], but and but['ledger'])
    self._wall += record['wall_seconds'] - (but['wall_seconds'] if but else 0.0)
    self._taken = {name: record[name] for name in ('ledger', 'wall_seconds')}

  def again(self, state: PyTree) -> tuple[PyTree, int]:
    """The state of the latest checkpoint, in the form of this one, whose arrays may be gone; and its rounds."""
    state, meta = self._restored(state)
    return state, meta['done']

  def _restored(self, state: PyTree) -> tuple[PyTree, dict]:
    fields, network = self._template
    with self.ledger.part('checkpoint'):
      tree, meta = self._checkpoints.restore(
          lambda parts: fields | ({'best': network} if 'best' in parts else {}))
    best = tree.pop('best', None)
    self.best_network = best if self._settings.keep_best else None
    self.best, self.last, self._saved = meta['best'], meta['last'], meta['done']
    return state.replace(**tree), meta

  def _tree(self, state: PyTree) -> dict[str, PyTree]:
    """What is saved; the best student once there is one."""
    return fields_of(state) | ({} if self.best_network is None else {'best': self.best_network})

  def _set_aside(self, done: int) -> None:
    """The summary of a run that had ended stays, under another name: else it would speak for the one that goes on."""
    with parallel.raise_on_all_processes():
      path = self.workdir / 'summary.json'
      if parallel.is_first() and path.exists():
        numbers = itertools.chain([''], (f'_{number}' for number in itertools.count(2)))
        names = (path.with_name(f'summary_after_{done}{number}.json') for number in numbers)
        with report.reporting_disk_errors(path):
          os.replace(path, next(name for name in names if not name.exists()))

  def judge(self, metrics: dict[str, float], done: int, state: PyTree, selection: str) -> None:
    """Notes what the student came to after `done` rounds, and keeps it if it is the best so far."""
    self.last = metrics | {'round': done}
    if self.last[selection] > self.best.get(selection, -1.0):
      self.best = self.last
      if self._settings.keep_best:
        self.best_network = copied(network_of(state))

  def save(self, done: int, state: PyTree) -> None:
    """Begins to write a checkpoint after `done` rounds, unless it is there."""
    if done == self._saved:
      return
    with self.ledger.part('checkpoint'):
      self._checkpoints.save(done, self._tree(state), self.meta | self.spent() | {
          'done': done, 'best': self.best, 'last': self.last,
          'reseeded': {str(of): times for of, times in self.reseeded.items()}})
    self._saved = done

  def spent(self) -> dict[str, Any]:
    """Time and counts so far, as JSON has them."""
    return {'ledger': self.ledger.state(), 'wall_seconds': self.wall_seconds()}

  def take_beside(self, record: dict[str, Any]) -> None:
    """Adds what was spent after the last round, as `spent` told it."""
    self._take(record, self._taken)

  def wait(self) -> None:
    """Returns when all that was saved is written."""
    with self.ledger.part('checkpoint'):
      self._checkpoints.wait()

  def latest(self) -> int | None:
    """Rounds in the latest checkpoint; None if there is none."""
    return self._checkpoints.latest()

  def wall_seconds(self) -> float:
    """Since the run began, without the time between one process and the next."""
    return self._wall + time.perf_counter() - self._began


def fingerprint(config: dict[str, Any]) -> str:
  """Alike of configs that compute the same."""
  return config_hash(config_diff.flatten(config))


def network_of(state: PyTree) -> Network:
  """The student in the state of a distillation, or of a training."""
  return getattr(state, 'student', state).network


def copied(tree: PyTree) -> PyTree:
  """Arrays in the same places that outlive those given, which programs will take over."""
  return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding, may_alias=False), tree)


def fields_of(state: PyTree) -> dict[str, PyTree]:
  """Those of a state, by name."""
  return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def shapes_of(tree: PyTree) -> PyTree:
  """What a checkpoint of a tree is read into."""
  return jax.tree.map(_shape_of, tree)


def _shape_of(leaf: Any) -> Any:
  """What a checkpoint is read into; arrays on the host are new ones, that take no memory until they are written."""
  if isinstance(leaf, np.ndarray):
    return np.zeros(leaf.shape, leaf.dtype)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
