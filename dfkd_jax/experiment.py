"""What every run of a config has: a folder, a test set, a ledger, checkpoints, a loop over rounds."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dfkd_jax import build, data, evaluate, faults, parallel, report, run_folder, stopping
from dfkd_jax.checkpoint import Checkpoints, config_hash
from dfkd_jax.models.network import Network
from dfkd_jax.types import PyTree

Advance = Callable[[PyTree, int, int], tuple[PyTree, dict[str, float]]]

_SHOWN = ('loss', 'top1', 'agreement', 'held_out_agreement', 'judge_top1')  # While a run goes on.
_REASONS = (None, 'budget.minutes', 'budget.images', *stopping.NAMES)  # To end early; the last has precedence.
_BEST = 'student.best is picked on the test images; student.last is not.'
_BEST_WITHOUT = 'No real image was seen: student.best is picked by held_out_agreement, on fresh synthetic images.'


class Experiment:
  """One run in one folder; a context manager, and nothing is written before it is entered.

  Args:
    config: Of the run; kept beside the checkpoints, and compared when the run goes on.
    workdir: Made if missing.
    unit: What the loop counts, 'round' or 'epoch'.
    command: That started the run, for the record.
    resume: In what a run that is there may go on with another config, see `run_folder.changed`.
    asked: Says whether the run is to end early.

  Raises:
    ValueError: The folder cannot be written or holds a run of another config, or the test set is not there.
  """

  def __init__(
      self, config: build.Config, workdir: str, unit: str, command: str | None = None, resume: str | None = None,
      asked: stopping.Asked = lambda: None):
    self._began = time.perf_counter()
    self.config, self.unit, self.command = config, unit, command
    self.workdir = pathlib.Path(workdir).expanduser()
    self.ledger = report.Ledger()
    with self.ledger.part('setup'):
      plain = _jsonable(config)
      self.meta = {'config': plain, 'hash': fingerprint(config), 'changed': []}
      run_folder.check_place(self.workdir)
      self.stored = run_folder.stored(self.workdir)
      self._changed = run_folder.changed(self.stored.get('config'), plain, self.workdir, resume)
      self.task = build.task(config)
      self.test = self.load(config.dataset.test_split, parallel.share()) if config.dataset.name is not None else None
    self.best: dict[str, Any] = {}
    self.last: dict[str, Any] = {}
    self.best_network: Network | None = None
    self._asked, self._resume = asked, resume
    self._reseeded: dict[int, int] = {}  # Rounds that were done again, and how often.
    self._saved = self._at = 0  # Rounds in the latest checkpoint, and the round that is under way.
    self._template: PyTree = None
    self._taken = contextlib.ExitStack()
    self._wall = 0.0  # Seconds of the processes that this one goes on from.
    self._answers: np.ndarray | None = None  # The teacher's, on the test images.
    self._compiled: set = set()  # Modules whose evaluation is.
    self._checkpoints: Checkpoints | None = None

  @property
  def selection(self) -> str:
    """The metric by which the best round is picked."""
    return 'held_out_agreement' if self.test is None else 'top1'

  def class_name(self, label: int) -> str:
    """What a class is called: its number, where no data set names it."""
    return str(label) if self.test is None else self.test.class_names[label]

  def stands_on(self, **weights: str | None) -> None:
    """Notes which weights the run stands on, by their SHA-256; None: there are none.

    Raises:
      ValueError: The folder holds a run that stands on others.
    """
    there = self.stored.get('weights', weights)
    for which, digest in weights.items():
      if there.get(which) != digest and self._resume != run_folder.FORCE:
        raise ValueError(
            f'{self.workdir} holds a run with another {which}, of SHA-256 {str(there.get(which))[:16]} there, '
            f'{str(digest)[:16]} here. Name another --workdir.')
    self.meta['weights'] = weights

  def load(self, split: str, shard: tuple[int, int] = (0, 1)) -> data.Dataset:
    """A split of the data set, or a shard of it; it must be as the config says."""
    section = self.config.dataset
    found = data.load(
        section.name, split, section.data_dir, image_shape=tuple(section.image_shape), crop=section.crop, shard=shard)
    classes = len(found.class_names)
    if classes != section.num_classes:
      raise ValueError(f'dataset.num_classes is {section.num_classes}, must be {classes}, as {section.name!r} has.')
    return found

  def finished(self) -> dict[str, Any] | None:
    """The summary, printed again, if this run has come to its end before."""
    found = run_folder.read_summary(self.workdir)
    if self._changed:
      return None
    if found is not None:
      report.note(f'This run has finished before. To run it anew, name another workdir than {self.workdir}.')
      report.say(report.format_summary(found))
    return found

  def __enter__(self) -> 'Experiment':
    with contextlib.ExitStack() as stack:
      stack.enter_context(run_folder.taken(self.workdir))
      self._checkpoints = stack.enter_context(
          Checkpoints(self.workdir / 'checkpoints', max_to_keep=self.config.checkpoint.max_to_keep))
      self._taken = stack.pop_all()
    return self

  def __exit__(self, *error) -> None:
    self._taken.__exit__(*error)

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

  def resume(self, state: PyTree) -> tuple[PyTree, int]:
    """The state where the run stopped, and how many rounds are done; else the state given, and 0."""
    self.ledger.count('starts')
    if self.config.checkpoint.keep_best:
      self.best_network = _copied(_network_of(state))
    self._template = jax.tree.map(_shape_of, self._tree(state))
    if self._checkpoints.latest() is None:
      report.note(f'Results go to {self.workdir}')
      return state, 0
    state, meta = self._restored(state)
    self._wall, self._reseeded = meta['wall_seconds'], {int(of): times for of, times in meta['reseeded'].items()}
    self.ledger.load(meta['ledger'])
    report.note(f'Going on in {self.workdir} after {self.unit} {meta["done"]}')
    self.meta['changed'] = meta['changed'] + (
        [{'after': meta['done'], 'fields': self._changed}] if self._changed else [])
    return state, meta['done']

  def _restored(self, state: PyTree) -> tuple[PyTree, dict]:
    """The latest checkpoint's state, in the form of this one, and meta data."""
    with self.ledger.part('checkpoint'):
      tree, meta = self._checkpoints.restore(self._template)
    self.best_network = tree.pop('best', None)
    self.best, self.last, self._saved = meta['best'], meta['last'], meta['done']
    return state.replace(**tree), meta

  def _tree(self, state: PyTree) -> dict[str, PyTree]:
    """What is saved."""
    tree = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return tree | ({} if self.best_network is None else {'best': self.best_network})

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
      self._save(0, state)
    while True:
      try:
        return self._rounds(state, done, total, advance, evaluate)
      except faults.Fault as fault:
        state, done = self._again(fault, state)

  def _rounds(self, state: PyTree, done: int, total: int, advance: Advance, evaluate: Callable) -> PyTree:
    every, save_every = self.config.evaluate.every, self.config.checkpoint.every
    with (report.MetricsWriter(self.workdir, resume_step=done) as writer,
          report.Progress(total, initial=done, unit=self.unit) as progress):
      self.stop_if_asked(done, total)
      for self._at in range(done, total):
        state, numbers = advance(state, self._at, self._reseeded.get(self._at, 0))
        done = self._at + 1
        if done % every == 0 or done == total:
          self._judge(evaluate(state, done), done, state)
          numbers = numbers | {name: value for name, value in self.last.items() if name != 'round'}
        writer.write(done, **numbers, **{f'seconds_{k}': v for k, v in self.ledger.seconds().items()})
        progress.update(**{name: numbers[name] for name in _SHOWN if name in numbers})
        reason = self._reason(done, total)
        if reason or done == total or done % save_every == 0:
          self._save(done, state)
        self._stop(reason, done, total)
    return state

  def stop_if_asked(self, done: int, total: int) -> None:
    """Raises Stopped if the run is to end now, after `done` of its rounds, of which none is unsaved."""
    self._stop(self._reason(done, total), done, total)

  def _reason(self, done: int, total: int) -> str | None:
    """Why to end early, if there is a reason; the same on all processes."""
    budget, reasons = self.config.budget, {self._asked()}
    if done < total and budget.minutes is not None and time.perf_counter() - self._began >= 60 * budget.minutes:
      reasons.add('budget.minutes')
    if done < total and budget.images is not None and self.ledger.counts()['synthesised'] >= budget.images:
      reasons.add('budget.images')
    own = max(_REASONS.index(reason) for reason in reasons)
    return _REASONS[int(parallel.of_processes(np.int64(own)).max())]

  def _stop(self, reason: str | None, done: int, total: int) -> None:
    if reason is None:
      return
    with self.ledger.part('checkpoint'):
      self._checkpoints.wait()
    place = f'saved in {self.workdir}' if done else 'before anything was to be saved'
    then = f'a larger config.{reason}' if reason == 'budget.images' else 'the same command'
    report.note(f'Stopped by {reason} after {self.unit} {done} of {total}, {place}; {then} goes on.')
    raise stopping.Stopped({
        'stopped': reason, 'done': done, 'total': total, 'student': {'last': self.last, 'best': self.best},
        'seconds': self.ledger.seconds(), 'counts': self.ledger.counts(), 'wall_seconds': self._wall_seconds(),
        'workdir': str(self.workdir)})

  def _again(self, fault: faults.Fault, state: PyTree) -> tuple[PyTree, int]:
    """The state to go on from after a round that failed, and how many rounds are done there.

    Raises:
      ValueError: It has failed too often.
    """
    index, saved = self._at, self._checkpoints.latest()
    times, most = self._reseeded.get(index, 0), self.config.faults.reseed
    where = f'{self.unit} {index + 1}: {fault}'
    faults.write(self.workdir, fault.about | {
        self.unit: index + 1, 'reseeded': times, 'seed': self.config.seed, 'checkpoint': saved,
        'config_hash': self.meta['hash'], 'command': self.command})
    if times >= most:
      kept = 'No checkpoint was written yet' if saved is None else f'The checkpoint of {self.unit} {saved} is kept'
      raise ValueError(
          f'In {where}. {kept}; {self.workdir / faults.REPORT} has what repeats it; '
          f'--config.faults.reseed={most + 1} does the {self.unit} again with other keys.') from fault
    self._reseeded[index] = times + 1
    self.ledger.count('reseeded')
    report.note(f'In {where}. It is done again with other keys, from {self.unit} {saved} on.')
    state, meta = self._restored(state)
    return state, meta['done']

  def _judge(self, metrics: dict[str, float], done: int, state: PyTree) -> None:
    self.last = metrics | {'round': done}
    if self.last[self.selection] > self.best.get(self.selection, -1.0):
      self.best = self.last
      if self.best_network is not None:
        self.best_network = _copied(_network_of(state))

  def _save(self, done: int, state: PyTree) -> None:
    if done == self._saved > 0:
      return
    with self.ledger.part('checkpoint'):
      self._checkpoints.save(done, self._tree(state), self.meta | {
          'done': done, 'best': self.best, 'last': self.last, 'ledger': self.ledger.state(),
          'reseeded': {str(of): times for of, times in self._reseeded.items()},
          'wall_seconds': self._wall_seconds()})
    self._saved = done

  def _wall_seconds(self) -> float:
    return self._wall + time.perf_counter() - self._began

  def summary(self, *, num_devices: int, files: tuple[str, ...], **results: Any) -> dict[str, Any]:
    """Writes summary.json, prints it for a reader, and returns it.

    Args:
      num_devices: Of the devices at hand, those that were used.
      files: Names of what the caller wrote to the workdir.
      **results: As `report.format_summary` takes them.
    """
    with self.ledger.part('checkpoint'):
      self._checkpoints.wait()
    found = results | {
        'student': {'last': self.last, 'best': self.best}, 'note': _BEST if self.test is not None else _BEST_WITHOUT,
        'seconds': self.ledger.seconds(), 'counts': self.ledger.counts(), 'wall_seconds': self._wall_seconds(),
        'seed': self.config.seed, 'changed': self.meta['changed'],
        'config': self.meta['config'], 'config_hash': self.meta['hash'], 'weights': self.meta['weights'],
        'versions': report.versions(),
        'device': report.device() | {'count': num_devices}, 'command': self.command, 'workdir': str(self.workdir),
        'files': ['summary.json', 'metrics.jsonl', *files, 'checkpoints/']}
    with parallel.together():  # So that no process reads what the first has not written yet.
      report.write_summary(self.workdir, found)
    report.say(report.format_summary(found))
    return found


def fingerprint(config: build.Config) -> str:
  """Alike of configs that compute the same."""
  return config_hash(run_folder.flat(_jsonable(config)))


def _jsonable(config: build.Config) -> dict:
  """A config as JSON has it: tuples as lists."""
  plain = lambda value: (
      {k: plain(v) for k, v in value.items()} if isinstance(value, dict)
      else [plain(v) for v in value] if isinstance(value, (list, tuple)) else value)
  return plain(config.to_dict())


def _network_of(state: PyTree) -> Network:
  """The student in the state of a distillation, or of a training."""
  return getattr(state, 'student', state).network


def _copied(tree: PyTree) -> PyTree:
  """Arrays in the same places that outlive those given, which programs will take over."""
  return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding, may_alias=False), tree)


def _shape_of(leaf: Any) -> Any:
  """What a checkpoint is read into; arrays on the host stand for themselves."""
  return leaf if isinstance(leaf, np.ndarray) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
