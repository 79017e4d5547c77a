"""What every run of a config has: a test set, a ledger, a store, a loop over rounds."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dfkd_jax import data, evaluate, parallel, paths, report
from dfkd_jax.config import build, records
from dfkd_jax.models.network import Network
from dfkd_jax.runs import non_finite
from dfkd_jax.runs import signals as run_signals
from dfkd_jax.runs.state import RunState
from dfkd_jax.types import PyTree

Advance = Callable[[PyTree, int, int], tuple[PyTree, dict[str, float]]]
_SHOWN = ('loss', 'top1', 'agreement', 'held_out_agreement', 'judge_top1')  # While a run goes on.
_REASONS = (None, 'budget.minutes', 'budget.images', *run_signals.NAMES)  # To end early; the last has precedence.
_BEST = 'student.best is picked on the test images; student.last is not.'
_BEST_WITHOUT = 'No real image was seen: student.best is picked by held_out_agreement, on fresh synthetic images.'


class Experiment:
  """One run in one folder; a context manager, and nothing is written before it is entered.

  Args:
    config: Of the run; kept beside the checkpoints, and compared when the run goes on.
    workdir: Made if missing.
    unit: What the loop counts, 'round' or 'epoch'.
    command: That started the run, for the record.
    resume: In what a run that is there may go on with another config, see `config_diff.config_changes`.
    asked: Says whether the run is to end early.

  Raises:
    ValueError: The folder cannot be written or holds a run of another config, or the test set is not there.
  """

  def __init__(
      self, config: build.Config, workdir: str, unit: str, command: str | None = None, resume: str | None = None,
      asked: run_signals.StopRequest | None = None):
    self._began = time.perf_counter()
    self.config, self.unit, self.command = config, unit, command
    self.workdir = paths.expand_path(workdir, 'workdir')
    self.ledger = report.Ledger()
    with self.ledger.part('setup'):
      self.store = RunState(records.run_settings(config), self.workdir, self.ledger, resume)
      self.task = build.task(config)
      self.test = self.load(config.dataset.test_split, parallel.process_shard()) if config.dataset.name is not None else None
    self._asked = asked or run_signals.StopRequest()
    self._at = 0  # The round that is under way.
    self._answers: np.ndarray | None = None  # The teacher's, on the test images.
    self._compiled: set = set()  # Modules whose evaluation is.

  @property
  def selection(self) -> str:
    """The metric by which the best round is picked."""
    return 'held_out_agreement' if self.test is None else 'top1'

  def class_name(self, label: int) -> str:
    """What a class is called: its number, where no data set names it."""
    return str(label) if self.test is None else self.test.class_names[label]

  def load(self, split: str, shard: tuple[int, int] = (0, 1)) -> data.Dataset:
    """A split of the data set, or a shard of it; it must be as the config says."""
    section = self.config.dataset
    found = data.load(
        section.name, split, section.data_dir, image_shape=tuple(section.image_shape), crop=section.crop, shard=shard)
    classes = len(found.class_names)
    if classes != section.num_classes:
      raise ValueError(f'dataset.num_classes is {section.num_classes}, must be {classes}, as {section.name!r} has.')
    return found

  def __enter__(self) -> 'Experiment':
    self._asked.defer()  # From now on there is something to save.
    self.store.__enter__()
    return self

  def __exit__(self, *error) -> None:
    self.store.__exit__(*error)

  def follow(self, teacher: Network) -> dict[str, float]:
    """Takes the teacher's answers on the test images, for `agreement`; returns its own metrics."""
    metrics = self.evaluate(teacher)
    ask = lambda images: evaluate.predict(
        teacher, images, batch_size=self.config.evaluate.batch_size, shared=True)
    with self.ledger.part('compile'):
      ask(self.test.images[:1])
    with self.ledger.part('evaluation'):
      self._answers = ask(self.test.images)
    return metrics

  def evaluate(self, network: Network) -> dict[str, float]:
    """A network on the test set."""
    judge = lambda images, labels, answers: evaluate.evaluate(
        network, (images, labels), task=self.task, batch_size=self.config.evaluate.batch_size,
        teacher_predictions=answers, shared=True)
    if network.module not in self._compiled:
      with self.ledger.part('compile'):
        judge(self.test.images[:1], self.test.labels[:1], None)
      self._compiled.add(network.module)
    with self.ledger.part('evaluation'):
      return judge(self.test.images, self.test.labels, self._answers)

  def loop(
      self, state: PyTree, done: int, total: int, advance: Advance,
      evaluate: Callable[[PyTree, int], dict[str, float]]
  ) -> PyTree:
    """Rounds `done` to `total`: advance, evaluate, write metrics, save.

    Args:
      state: After `done` rounds.
      done: Rounds so far.
      total: Rounds of the whole run.
      advance: (state, round, how often it was reseeded) -> (state, numbers to log).
      evaluate: (state, rounds done) -> metrics, among them `selection`.

    Returns:
      The state at the end.

    Raises:
      stopping.Stopped: The run was asked to end early, and is saved.
      ValueError: A number was not finite, more often than may be.
    """
    if self.config.faults.reseed and not done:  # Else there would be nothing to go back to.
      self.store.save(0, state)
    while True:
      try:
        return self._rounds(state, done, total, advance, evaluate)
      except non_finite.Fault as fault:
        state, done = self._again(fault, state)

  def _rounds(self, state: PyTree, done: int, total: int, advance: Advance, evaluate: Callable) -> PyTree:
    every, save_every = self.config.evaluate.every, self.config.checkpoint.every
    with contextlib.ExitStack() as stack:
      with parallel.raise_on_all_processes():  # What the first process alone writes, and cannot, is told on all.
        writer = stack.enter_context(report.MetricsWriter(self.workdir, resume_step=done))
      progress = stack.enter_context(report.Progress(total, initial=done, unit=self.unit))
      self.stop(self.reason(images=done < total), done, total)
      for self._at in range(done, total):
        state, numbers = advance(state, self._at, self.store.reseeded.get(self._at, 0))
        done = self._at + 1
        if done % every == 0 or done == total:
          self.store.record_metrics(evaluate(state, done), done, state, self.selection)
          numbers = numbers | {name: value for name, value in self.store.last.items() if name != 'round'}
        with parallel.raise_on_all_processes():
          writer.write(done, **numbers, **{f'seconds_{k}': v for k, v in self.ledger.seconds().items()})
        progress.update(**{name: numbers[name] for name in _SHOWN if name in numbers})
        reason = self.reason(minutes=done < total, images=done < total)
        if reason or done == total or done % save_every == 0:
          with parallel.raise_on_all_processes():
            writer.sync()  # No checkpoint is without the lines before it.
          self.store.save(done, state)
        self.stop(reason, done, total)
    return state

  def reason(self, *, minutes: bool = False, images: bool = False) -> str | None:
    """Why to end early, if there is a reason; the same on all processes.

    Args:
      minutes: Whether the budget of time counts. A start that has done nothing yet goes on, or none ever would.
      images: Whether that of images does.
    """
    budget, reasons = self.config.budget, {self._asked.signal}
    if minutes and budget.minutes is not None and time.perf_counter() - self._began >= 60 * budget.minutes:
      reasons.add('budget.minutes')
    if images and budget.images is not None and self.ledger.counts()['synthesised'] >= budget.images:
      reasons.add('budget.images')
    own = max(_REASONS.index(reason) for reason in reasons)
    return _REASONS[int(parallel.gather_processes(np.int64(own)).max())]

  def stop(self, reason: str | None, done: int, total: int, more: str = '') -> None:
    """Raises stopping.Stopped if there is a reason, after `done` of `total` rounds, and what `more` says."""
    if reason is None:
      return
    self.store.wait()
    place = f'saved in {self.workdir}' if done else 'before anything was to be saved'
    then = f'a larger config.{reason}' if reason == 'budget.images' else 'the same command'
    report.note(f'Stopped by {reason} after {self.unit} {done} of {total}{more}, {place}; {then} goes on.')
    raise run_signals.Stopped({
        'stopped': reason, 'done': done, 'total': total, 'student': {'last': self.store.last, 'best': self.store.best},
        'seconds': self.ledger.seconds(), 'counts': self.ledger.counts(), 'wall_seconds': self.store.wall_seconds(),
        'workdir': str(self.workdir)})

  def _again(self, fault: non_finite.Fault, state: PyTree) -> tuple[PyTree, int]:
    """The state to go on from after a round that failed, and how many rounds are done there.

    Raises:
      ValueError: It has failed too often.
    """
    index = self._at
    times, most = self.store.reseeded.get(index, 0), self.config.faults.reseed
    where, saved = f'{self.unit} {index + 1}: {fault}', None
    for _ in range(2):  # Once for a checkpoint that could not be written, which is not what went wrong here.
      with contextlib.suppress(ValueError):
        saved = self.store.latest()
    # That of a round which is done again stays beside what becomes of it.
    path = self.workdir / (non_finite.REPORT if times >= most else f'fault_{index + 1}_{times + 1}.json')
    non_finite.write_report(path, fault.about | {
        self.unit: index + 1, 'reseeded': times, 'seed': self.config.seed, 'checkpoint': saved,
        'config_hash': self.store.meta['hash'], 'command': self.command})
    if times >= most:
      kept = 'No checkpoint was written yet' if saved is None else f'The checkpoint of {self.unit} {saved} is kept'
      raise ValueError(
          f'In {where}. {kept}; {path} has what repeats it; '
          f'--config.faults.reseed={most + 1} does the {self.unit} again with other keys.') from fault
    self.store.reseeded[index] = times + 1
    self.ledger.count('reseeded')
    report.note(f'In {where}. It is done again with other keys, from {self.unit} {saved} on.')
    return self.store.restore_latest(state)

  def summary(self, *, num_devices: int, files: tuple[str, ...], **results: Any) -> dict[str, Any]:
    """Writes summary.json, prints it for a reader, and returns it.

    Args:
      num_devices: Of the devices at hand, those that were used.
      files: Names of what the caller wrote to the workdir.
      **results: As `report.format_summary` takes them.
    """
    self.store.wait()
    meta = self.store.meta
    found = results | {
        'student': {'last': self.store.last, 'best': self.store.best},
        'note': _BEST if self.test is not None else _BEST_WITHOUT,
        'seconds': self.ledger.seconds(), 'counts': self.ledger.counts(), 'wall_seconds': self.store.wall_seconds(),
        'seed': self.config.seed, 'config_hash': meta['hash'], 'versions': report.versions(),
        **{name: meta[name] for name in ('config', 'jax', 'changed', 'weights')},
        'device': report.device() | {'count': num_devices}, 'command': self.command, 'workdir': str(self.workdir),
        'files': ['summary.json', 'metrics.jsonl', *files, 'checkpoints/', *self._faults()]}
    with parallel.raise_on_all_processes():  # So that no process reads what the first has not written yet.
      report.write_summary(self.workdir, found)
    self.store.remove_control()
    report.say(report.format_summary(found))
    return found

  def _faults(self) -> list[str]:
    """Names of the reports of rounds that failed."""
    return sorted(path.name for path in self.workdir.glob('fault*.json'))
