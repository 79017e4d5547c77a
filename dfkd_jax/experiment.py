"""What every run of a config has: a folder, a test set, a ledger, checkpoints, a loop over rounds."""

import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dfkd_jax import build, data, evaluate, report
from dfkd_jax.checkpoint import Checkpoints, config_hash
from dfkd_jax.models.network import Network
from dfkd_jax.types import PyTree

Advance = Callable[[PyTree, int], tuple[PyTree, dict[str, float]]]


class Experiment:
  """One run in one folder; a context manager.

  Args:
    config: Of the run; kept beside the checkpoints, and compared when the run goes on.
    workdir: Made if missing.
    unit: What the loop counts, 'round' or 'epoch'.

  Raises:
    ValueError: The folder cannot be written or holds a run of another config, or the test set is not there.
  """

  def __init__(self, config: build.Config, workdir: str, unit: str):
    self.began = time.perf_counter()
    self.config, self.unit, self.workdir = config, unit, pathlib.Path(workdir)
    self.ledger = report.Ledger()
    with self.ledger.part('setup'):
      self.task = build.task(config)
      section = config.dataset
      self.test = data.load(
          section.name, section.test_split, section.data_dir, image_shape=tuple(section.image_shape))
      found = len(self.test.class_names)
      if found != section.num_classes:
        raise ValueError(f'dataset.num_classes is {section.num_classes}, but {section.name!r} has {found} classes.')
    self.best: dict[str, Any] = {}
    self.last: dict[str, Any] = {}
    self.answers: np.ndarray | None = None  # the teacher's, on the test images
    self.meta = {'config': _jsonable(config), 'hash': config_hash(_jsonable(config))}
    self._checkpoints = None

  def __enter__(self) -> 'Experiment':
    self._checkpoints = Checkpoints(self.workdir / 'checkpoints', max_to_keep=self.config.checkpoint.max_to_keep)
    self._checkpoints.__enter__()
    if self._checkpoints.latest() is not None:
      _same_config(self._checkpoints.meta()['config'], self.meta['config'], self.workdir)
    return self

  def __exit__(self, *error) -> None:
    self._checkpoints.__exit__(*error)

  def follow(self, teacher: Network) -> dict[str, float]:
    """Takes the teacher's answers on the test images, for `agreement`; returns its own metrics."""
    with self.ledger.part('evaluation'):
      self.answers = evaluate.predict(teacher, self.test.images, batch_size=self.config.evaluate.batch_size)
    return self.evaluate(teacher)

  def evaluate(self, network: Network) -> dict[str, float]:
    """A network on the test set."""
    with self.ledger.part('evaluation'):
      return evaluate.evaluate(
          network, self.test, task=self.task, batch_size=self.config.evaluate.batch_size,
          teacher_predictions=self.answers)

  def resume(self, state: PyTree) -> tuple[PyTree, int]:
    """The state where the run stopped, and how many rounds are done; else the state given, and 0."""
    if self._checkpoints.latest() is None:
      return state, 0
    with self.ledger.part('checkpoint'):
      state, meta = self._checkpoints.restore(state)
    self.best, self.last, done = meta['best'], meta['last'], meta['done']
    self.ledger.load(meta['seconds'])
    print(f'Going on in {self.workdir} after {self.unit} {done}.', file=sys.stderr)
    return state, done

  def loop(self, state: PyTree, done: int, total: int, advance: Advance, network_of: Callable[[PyTree], Network]):
    """Rounds `done` to `total`: advance, evaluate, write metrics, save.

    Args:
      state: After `done` rounds.
      done: Rounds so far.
      total: Rounds of the whole run.
      advance: (state, round) -> (state, numbers to log).
      network_of: The network in a state.

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
          self._judge(network_of(state), done)
          numbers = numbers | {name: value for name, value in self.last.items() if name != 'round'}
        writer.write(done, **numbers, **{f'seconds_{k}': v for k, v in self.ledger.seconds().items()})
        progress.update(**{name: numbers[name] for name in ('loss', 'top1', 'agreement') if name in numbers})
        if done == total or done % save_every == 0:
          self._save(done, state)
    return state

  def _judge(self, network: Network, done: int) -> None:
    self.last = self.evaluate(network) | {'round': done}
    if self.last['top1'] > self.best.get('top1', -1.0):
      self.best = self.last

  def _save(self, done: int, state: PyTree) -> None:
    with self.ledger.part('checkpoint'):
      self._checkpoints.save(done, state, self.meta | {
          'done': done, 'best': self.best, 'last': self.last, 'seconds': self.ledger.state()})

  def summary(self, **results: Any) -> dict[str, Any]:
    """Writes summary.json, prints it for a reader, and returns it."""
    seconds = self.ledger.seconds()
    found = results | {
        'seconds': seconds, 'wall_seconds': sum(seconds.values()), 'seed': self.config.seed,
        'config': self.meta['config'], 'config_hash': self.meta['hash'], 'versions': report.versions(),
        'device': report.device(), 'command': ' '.join(['python', *sys.argv]), 'workdir': str(self.workdir)}
    report.write_summary(self.workdir, found)
    print(report.format_summary(found))
    return found


def _jsonable(config: build.Config) -> dict:
  """A config as JSON has it: tuples as lists."""
  plain = lambda value: (
      {k: plain(v) for k, v in value.items()} if isinstance(value, dict)
      else [plain(v) for v in value] if isinstance(value, (list, tuple)) else value)
  found = plain(config.to_dict())
  found.pop('compilation_cache', None)  # Where programs are cached is no part of what a run computes.
  return found


def _same_config(stored: dict, given: dict, workdir: pathlib.Path) -> None:
  flat = lambda tree: {jax.tree_util.keystr(path, simple=True, separator='.'): value
                       for path, value in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda v: v is None)}
  there, here = flat(stored), flat(given)
  for name in sorted(there | here):
    if there.get(name) != here.get(name):
      raise ValueError(
          f'{workdir} holds a run with another config: {name} is {there.get(name)!r} there, {here.get(name)!r} here. '
          'Name another --workdir.')
