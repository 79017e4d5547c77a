"""One run in one folder: its test set, its ledger, its state, and the loop over rounds."""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dfkd_jax import evaluate, parallel, paths, report, weights
from dfkd_jax.config import build
from dfkd_jax.config.records import NetworkSettings, Settings
from dfkd_jax.models.network import Network
from dfkd_jax.runs import non_finite
from dfkd_jax.runs import signals as run_signals
from dfkd_jax.runs.state import RunState
from dfkd_jax.types import PRNGKey, PyTree

# Reasons to end early; a later one wins.
_REASONS = (None, 'budget.minutes', 'budget.images', *run_signals.NAMES)
_PICKED_ON_TEST = 'student.best is picked on the test images; student.last is not.'
_PICKED_ON_SYNTHETIC = ('No real image was seen: student.best is picked by held_out_agreement, '
                        'on fresh synthetic images.')
_EVENTS = (1 << 30) + 1  # of the keys derived from the seed: none of the job's own
# A round, counted from 0, and (state, key) -> state, which is called when that round begins.
Event = tuple[int, Callable[[PyTree, PRNGKey], PyTree]]


class Start(NamedTuple):
  """How a run is started."""

  workdir: str  # made if missing
  command: str | None = None  # for the record
  resume: str | None = None  # config fields that may differ from the run in the folder
  stop_request: run_signals.StopRequest | None = None  # says whether to end early


def round_key(run_key: PRNGKey, index: int, reseeded: int) -> PRNGKey:
  """Returns the key of a round or call; each repetition has another."""
  key = jax.random.fold_in(run_key, index)
  return jax.random.fold_in(key, reseeded) if reseeded else key


class Experiment:
  """One run; its `unit` is a round or an epoch. Writes nothing before `open`."""

  def __init__(self, settings: Settings, start: Start, unit: str):
    self._began = time.perf_counter()
    self.settings, self.task, self.unit = settings.run, settings.task, unit
    self._command, self._stop_request = start.command, start.stop_request
    self.workdir = paths.expand_path(start.workdir, 'workdir')
    self.ledger = report.Ledger()
    self.mesh = build.make_mesh(settings)
    with self.ledger.part('setup'):
      self.store = RunState(self.settings, self.workdir, self.ledger, start.resume)
      self.test = None if settings.dataset.name is None else build.load_split(
          settings.dataset, settings.task, settings.dataset.test_split, parallel.process_shard())
    # The metric that picks the best round.
    self.selection = 'held_out_agreement' if self.test is None else self.task.selection
    self._shown = ('loss', self.task.selection, 'agreement', 'held_out_agreement', 'judge_top1')
    self._index = 0  # of the current round
    self._event_key = jax.random.fold_in(jax.random.key(self.settings.seed), _EVENTS)
    self._teacher_metrics: dict[str, float] | None = None
    self._teacher_predictions: np.ndarray | None = None  # on the test images
    self._compiled: set = set()  # modules with a compiled evaluation

  def open(self) -> contextlib.AbstractContextManager[None]:
    """Opens the folder of the run; signals are deferred from now on, to save its state."""
    if self._stop_request is not None:
      self._stop_request.defer()
    return self.store.open()

  def cache_teacher_predictions(self, teacher: Network) -> None:
    """Keeps the teacher's metrics, and its predictions on the test images for `agreement`."""
    self._teacher_metrics, batch_size = self.evaluate(teacher), self.settings.evaluate_batch_size
    predict = lambda images: evaluate.predict(teacher, images, batch_size=batch_size, shared=True)
    with self.ledger.part('compile'):
      predict(self.test.images[:1])
    with self.ledger.part('evaluation'):
      self._teacher_predictions = predict(self.test.images)

  def evaluate(self, network: Network) -> dict[str, float]:
    """Evaluates a network on the test images."""
    run = lambda images, labels, predictions: evaluate.evaluate(
        network, (images, labels), task=self.task, teacher_predictions=predictions, shared=True,
        batch_size=self.settings.evaluate_batch_size)
    if network.module not in self._compiled:
      with self.ledger.part('compile'):
        run(self.test.images[:1], self.test.labels[:1], None)
      self._compiled.add(network.module)
    with self.ledger.part('evaluation'):
      return run(self.test.images, self.test.labels, self._teacher_predictions)

  def loop(self, state: PyTree, done: int, total: int, advance: Callable, evaluate: Callable,
           events: Sequence[Event] = ()) -> PyTree:
    """Runs rounds `done` to `total`: advances, evaluates, writes metrics, saves. Returns the state.

    The `events` of a round come before it, and after the checkpoint of the rounds before: a run
    that resumes there repeats them with the same state and key.

    `advance(state, round, times it was reseeded)` returns the state and numbers to log, and
    `evaluate(state, rounds done)` metrics, among them `selection`. Raises run_signals.Stopped if
    the run was asked to end early, and is saved. Raises ValueError if a round had non-finite
    numbers more often than `faults.reseed` allows.
    """
    if self.settings.reseed and not done:
      self.store.save(0, state)  # for a first round that fails
    while True:
      try:
        return self._run_rounds(state, done, total, advance, evaluate, events)
      except non_finite.Fault as fault:
        self._report_fault(fault)
        state, meta = self.store.restore(state)
        done = meta['done']

  def _run_rounds(self, state, done, total, advance, evaluate, events):
    with contextlib.ExitStack() as stack:
      with parallel.raise_on_all_processes():
        writer = stack.enter_context(report.MetricsWriter(self.workdir, resume_step=done))
      progress = stack.enter_context(report.Progress(total, initial=done, unit=self.unit))
      self.stop(self.stop_reason(images=done < total), done, total)
      for self._index in range(done, total):
        reseeded = self.store.reseeded.get(self._index, 0)
        for number, (index, event) in enumerate(events):
          if index == self._index:
            state = event(state, round_key(jax.random.fold_in(self._event_key, number), index,
                                           reseeded))
        state, numbers = advance(state, self._index, reseeded)
        done = self._index + 1
        if done % self.settings.evaluate_every == 0 or done == total:
          self.store.record_metrics(evaluate(state, done), done, state, self.selection)
          numbers |= {name: value for name, value in self.store.last.items() if name != 'round'}
        seconds = {f'seconds_{part}': value for part, value in self.ledger.seconds().items()}
        with parallel.raise_on_all_processes():
          writer.write(done, **numbers, **seconds)
        progress.update(**{name: numbers[name] for name in self._shown if name in numbers})
        reason = self.stop_reason(minutes=done < total, images=done < total)
        if reason or done == total or done % self.settings.save_every == 0:
          with parallel.raise_on_all_processes():
            writer.sync()  # before the checkpoint of these lines
          self.store.save(done, state)
        self.stop(reason, done, total)
    return state

  def stop_reason(self, *, minutes: bool = False, images: bool = False) -> str | None:
    """Returns why to end early, or None. Checks the budgets of `minutes` and `images` if set."""
    settings, reasons = self.settings, {self._stop_request.signal if self._stop_request else None}
    seconds = time.perf_counter() - self._began
    if minutes and settings.minutes is not None and seconds >= 60 * settings.minutes:
      reasons.add('budget.minutes')
    synthesised = self.ledger.counts()['synthesised']
    if images and settings.images is not None and synthesised >= settings.images:
      reasons.add('budget.images')
    strongest = max(_REASONS.index(reason) for reason in reasons)
    return _REASONS[int(parallel.gather_processes(np.int64(strongest)).max())]

  def stop(self, reason: str | None, done: int, total: int, more: str = '') -> None:
    """Raises `run_signals.Stopped` if there is a reason; `more` completes the note on progress."""
    if reason is None:
      return
    self.store.wait()
    place = f'saved in {self.workdir}' if done else 'before there was anything to save'
    then = f'a larger config.{reason}' if reason == 'budget.images' else 'the same command'
    report.note(f'Stopped by {reason} after {self.unit} {done} of {total}{more}, {place}; '
                f'{then} goes on.')
    raise run_signals.Stopped({'stopped': reason, 'done': done, 'total': total, **self._results(),
                               'workdir': str(self.workdir)})

  def _report_fault(self, fault: non_finite.Fault) -> None:
    """Writes a report of the round; raises ValueError if the round has failed too often."""
    index, saved = self._index, None
    times, most = self.store.reseeded.get(index, 0), self.settings.reseed
    for _ in range(2):  # the first call may raise for a checkpoint that could not be written
      with contextlib.suppress(ValueError):
        saved = self.store.checkpoints.latest()
    repeats = times < most  # the report of a repeated round keeps a name of its own
    path = self.workdir / (f'fault_{index + 1}_{times + 1}.json' if repeats else 'fault.json')
    about = fault.about | {
        self.unit: index + 1, 'reseeded': times, 'seed': self.settings.seed, 'checkpoint': saved,
        'config_hash': self.store.meta['hash'], 'command': self._command}
    with parallel.raise_on_all_processes():
      if parallel.is_first():
        with report.reporting_disk_errors(path), report.replace_file(path) as file:
          file.write(json.dumps(about, indent=2).encode() + b'\n')
    where = f'{self.unit} {index + 1}: {fault}'
    if not repeats:
      kept = 'No checkpoint was written yet' if saved is None else (
          f'The checkpoint of {self.unit} {saved} is kept')
      raise ValueError(
          f'In {where}. {kept}; {path} tells how to repeat it; --config.faults.reseed={most + 1} '
          f'repeats the {self.unit} with other keys.') from fault
    self.store.reseeded[index] = times + 1
    self.ledger.count('reseeded')
    report.note(f'In {where}. Repeating it with other keys from {self.unit} {saved} on.')

  def write_networks(self, stem: str, last: Network, settings: NetworkSettings) -> tuple[str, ...]:
    """Writes the last network and, if it was kept, the best one; returns the names of the files.

    Safetensors that `teacher.source` takes, with a probe that shows if a reader computes the same.
    """
    networks = {f'{stem}.safetensors': last, f'{stem}_best.safetensors': self.store.best_network}
    kept = {self.workdir / name: network for name, network in networks.items()
            if network is not None}
    with parallel.raise_on_all_processes():
      for path, network in kept.items() if parallel.is_first() else ():
        network = jax.device_get(parallel.local_copy(network))
        about = {'model': settings.name, 'mean': network.mean, 'std': network.std,
                 'bgr': network.bgr, 'resize': network.resize}
        data = weights.to_safetensors(
            {'params': network.params, 'batch_stats': network.batch_stats},
            {'network': json.dumps(about)}, probe=weights.make_probe(network, settings.image_shape))
        with report.reporting_disk_errors(path), report.replace_file(path) as file:
          file.write(data)
    return tuple(path.name for path in kept)

  def _results(self) -> dict[str, Any]:
    """Returns metrics, times and counts so far."""
    return {'student': {'last': self.store.last, 'best': self.store.best},
            'seconds': self.ledger.seconds(), 'counts': self.ledger.counts(),
            'wall_seconds': self.store.wall_seconds()}

  def write_summary(self, files: tuple[str, ...], **results: Any) -> dict[str, Any]:
    """Writes summary.json with the caller's `files` and `results`, prints it, and returns it."""
    self.store.wait()
    meta = self.store.meta
    faults = sorted(path.name for path in self.workdir.glob('fault*.json'))
    is_dense = self.task.label_axes > 0  # Each class has an IoU.
    class_names = list(self.test.class_names) if is_dense and self.test is not None else None
    summary = results | self._results() | {
        'note': _PICKED_ON_SYNTHETIC if self.test is None else _PICKED_ON_TEST,
        'columns': self.task.columns, 'class_names': class_names, 'seed': self.settings.seed,
        'config_hash': meta['hash'],
        **{name: meta[name] for name in ('config', 'jax', 'changed', 'weights')},
        'versions': report.versions(), 'device': report.device() | {'count': self.mesh.size},
        'command': self._command, 'workdir': str(self.workdir), 'teacher': self._teacher_metrics,
        'files': ['summary.json', 'metrics.jsonl', *files, 'checkpoints/', *faults]}
    with parallel.raise_on_all_processes():  # no process reads it before the first has written it
      report.write_summary(self.workdir, summary)
    self.store.remove_control()
    report.say(report.format_summary(summary))
    return summary
