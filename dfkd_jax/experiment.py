"""What every run of a config has: a folder, a test set, a ledger, checkpoints, a loop over rounds."""

import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dfkd_jax import build, data, evaluate, parallel, report
from dfkd_jax.checkpoint import Checkpoints, config_hash
from dfkd_jax.models.network import Network
from dfkd_jax.types import PyTree

Advance = Callable[[PyTree, int], tuple[PyTree, dict[str, float]]]

# Where things lie and run is no part of what a run computes: it may go on with them elsewhere.
_SHOWN = ('loss', 'top1', 'agreement', 'held_out_agreement', 'judge_top1')  # While a run goes on.
_PLACES = (
    'buffer', 'compilation_cache', 'dataset.data_dir', 'device_memory_gb', 'num_devices', 'distributed.coordinator',
    'distributed.num_processes', 'distributed.process_id', 'distributed.timeout')
_LONGEST_NAME = 255  # Of a file or folder, on the usual file systems.
_FILES = ('metrics.jsonl', 'summary.json', 'images.png', 'student.safetensors', 'weights.safetensors')
_BEST = 'student.best is picked on the test images; student.last is not.'
_BEST_WITHOUT = 'No real image was seen: student.best is picked by held_out_agreement, on fresh synthetic images.'


class Experiment:
  """One run in one folder; a context manager, and nothing is written before it is entered.

  Args:
    config: Of the run; kept beside the checkpoints, and compared when the run goes on.
    workdir: Made if missing.
    unit: What the loop counts, 'round' or 'epoch'.
    command: That started the run, for the record.

  Raises:
    ValueError: The folder cannot be written or holds a run of another config, or the test set is not there.
  """

  def __init__(self, config: build.Config, workdir: str, unit: str, command: str | None = None):
    self._began = time.perf_counter()
    self.config, self.unit, self.command = config, unit, command
    self.workdir = pathlib.Path(workdir).expanduser()
    self.ledger = report.Ledger()
    with self.ledger.part('setup'):
      plain = _jsonable(config)
      self.meta = {'config': plain, 'hash': fingerprint(config)}
      check_place(self.workdir)
      self.stored = _stored(self.workdir)
      _same_config(self.stored.get('config'), plain, self.workdir)
      self.task = build.task(config)
      self.test = self.load(config.dataset.test_split, parallel.share()) if config.dataset.name is not None else None
    self.best: dict[str, Any] = {}
    self.last: dict[str, Any] = {}
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
      if there.get(which) != digest:
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
    found = _read_summary(self.workdir)
    if found is not None:
      report.note(f'This run has finished before. To run it anew, name another workdir than {self.workdir}.')
      report.say(report.format_summary(found))
    return found

  def __enter__(self) -> 'Experiment':
    self._checkpoints = Checkpoints(self.workdir / 'checkpoints', max_to_keep=self.config.checkpoint.max_to_keep)
    self._checkpoints.__enter__()
    return self

  def __exit__(self, *error) -> None:
    self._checkpoints.__exit__(*error)

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
    if self._checkpoints.latest() is None:
      report.note(f'Results go to {self.workdir}')
      return state, 0
    with self.ledger.part('checkpoint'):
      state, meta = self._checkpoints.restore(state)
    self.best, self.last, self._wall = meta['best'], meta['last'], meta['wall_seconds']
    self.ledger.load(meta['ledger'])
    report.note(f'Going on in {self.workdir} after {self.unit} {meta["done"]}')
    return state, meta['done']

  def loop(
      self, state: PyTree, done: int, total: int, advance: Advance,
      evaluate: Callable[[PyTree, int], dict[str, float]]
  ) -> PyTree:
    """Rounds `done` to `total`: advance, evaluate, write metrics, save.

    Args:
      state: After `done` rounds.
      done: Rounds so far.
      total: Rounds of the whole run.
      advance: (state, round) -> (state, numbers to log).
      evaluate: (state, rounds done) -> metrics, among them `selection`.

    Returns:
      The state at the end.
    """
    every, save_every = self.config.evaluate.every, self.config.checkpoint.every
    with (report.MetricsWriter(self.workdir, resume_step=done) as writer,
          report.Progress(total, initial=done, unit=self.unit) as progress):
      for index in range(done, total):
        state, numbers = advance(state, index)
        done = index + 1
        if done % every == 0 or done == total:
          self._judge(evaluate(state, done), done)
          numbers = numbers | {name: value for name, value in self.last.items() if name != 'round'}
        writer.write(done, **numbers, **{f'seconds_{k}': v for k, v in self.ledger.seconds().items()})
        progress.update(**{name: numbers[name] for name in _SHOWN if name in numbers})
        if done == total or done % save_every == 0:
          self._save(done, state)
    return state

  def _judge(self, metrics: dict[str, float], done: int) -> None:
    self.last = metrics | {'round': done}
    if self.last[self.selection] > self.best.get(self.selection, -1.0):
      self.best = self.last

  def _save(self, done: int, state: PyTree) -> None:
    with self.ledger.part('checkpoint'):
      self._checkpoints.save(done, state, self.meta | {
          'done': done, 'best': self.best, 'last': self.last, 'ledger': self.ledger.state(),
          'wall_seconds': self._wall_seconds()})

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
        'seconds': self.ledger.seconds(), 'wall_seconds': self._wall_seconds(), 'seed': self.config.seed,
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
  return config_hash(_compared(_jsonable(config)))


def check_place(workdir: pathlib.Path) -> None:
  """Raises ValueError if the folder could not be made or written, without trying to."""
  what, nearest = f'workdir is {str(workdir)!r}', workdir.absolute()
  if '\0' in str(workdir):
    raise ValueError(f'{what}, must be a path.')
  if (longest := max(map(len, map(os.fsencode, workdir.parts)), default=0)) > _LONGEST_NAME:
    raise ValueError(f'{what}, must have names of at most {_LONGEST_NAME} bytes, not {longest}.')
  while not os.path.lexists(nearest):
    nearest = nearest.parent
  if not nearest.is_dir():
    kind = 'file' if nearest.exists() else 'link that leads nowhere'
    raise ValueError(f'{what}, must be a folder: {nearest} is a {kind}.')
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise ValueError(f'{what}, must be writable: {nearest} is not.')
  for name in _FILES:  # Else a run would come to its end, and fail there.
    if (workdir / name).is_dir():
      raise ValueError(f'{what}, must be a folder for a run: {name} in it is no file.')
  if os.path.lexists(workdir / 'checkpoints') and not (workdir / 'checkpoints').is_dir():
    raise ValueError(f'{what}, must be a folder for a run: checkpoints in it is no folder.')


def _stored(workdir: pathlib.Path) -> dict[str, Any]:
  """What is known of the run in a folder: the summary if it has ended, else its latest checkpoint's meta data."""
  if (summary := _read_summary(workdir)) is not None:
    return summary
  if not (workdir / 'checkpoints').is_dir():
    return {}
  with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
    return checkpoints.meta() if checkpoints.steps() else {}


def _read_summary(workdir: pathlib.Path) -> dict | None:
  try:
    found = json.loads((workdir / 'summary.json').read_text(encoding='utf-8'))
  except (OSError, ValueError):  # A damaged one is written anew.
    return None
  return found if isinstance(found, dict) and 'config' in found else None


def _jsonable(config: build.Config) -> dict:
  """A config as JSON has it: tuples as lists."""
  plain = lambda value: (
      {k: plain(v) for k, v in value.items()} if isinstance(value, dict)
      else [plain(v) for v in value] if isinstance(value, (list, tuple)) else value)
  return plain(config.to_dict())


def _same_config(stored: dict | None, given: dict, workdir: pathlib.Path) -> None:
  """Raises ValueError that names the first field in which a run that is there differs from the one wanted."""
  if stored is None:
    return
  there, here = _compared(stored), _compared(given)
  for name in sorted(there | here):
    if there.get(name) != here.get(name):
      raise ValueError(
          f'{workdir} holds a run with another config: {name} is {there.get(name)!r} there, {here.get(name)!r} here. '
          'Name another --workdir.')


def _compared(config: dict) -> dict[str, Any]:
  """Fields by dotted name, without those that are no part of what a run computes."""
  leaves = jax.tree_util.tree_leaves_with_path(config, is_leaf=_is_value)
  flat = {jax.tree_util.keystr(path, simple=True, separator='.'): value for path, value in leaves}
  return {name: value for name, value in flat.items() if name not in _PLACES}


def _is_value(tree: Any) -> bool:
  return not isinstance(tree, dict)
