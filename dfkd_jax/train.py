"""Runs a config: checks it, joins the processes, and hands it to its job."""

import contextlib
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from dfkd_jax import parallel, paths
from dfkd_jax.config.check import check_structure, check_values, find_problems, is_single_process
from dfkd_jax.config.problems import Problems, raise_problems
from dfkd_jax.config.records import Settings, resolve
from dfkd_jax.jobs import distillation, preflight, supervised
from dfkd_jax.models.network import Network
from dfkd_jax.parallel import launch
from dfkd_jax.runs import config_diff, init_from
from dfkd_jax.runs import folder as run_folder
from dfkd_jax.runs import signals as run_signals
from dfkd_jax.runs.checkpoint_format import hash_json
from dfkd_jax.runs.loop import Start


def run(
    config: ConfigDict, workdir: str, command: str | None = None, teacher: Network | None = None,
    *, resume: str | None = None,
    signals: bool | run_signals.StopRequest = False) -> dict[str, Any]:
  """Runs a config, writes the results to `workdir`, and returns the summary.

  The same config in the same folder resumes where it stopped, bit for bit. If the run has finished,
  its summary is returned. A run that was asked to end early saves its state and returns the summary
  of `run_signals.Stopped`. Of several processes (`launch.initialize`) all must call this, with the
  same config and a folder that all see.

  Args:
    workdir: Folder of the results; made if missing.
    command: Command that started the run, for the record.
    teacher: A network of yours (`models.bind`) that replaces the config's teacher.
    resume: 'force' resumes a run of another config; 'force:FIELD,...' if only these fields differ.
    signals: Whether to end after the current round on SIGTERM or SIGINT; or the value of
      `run_signals.signals` if it listens already.

  Raises an InvalidError with one line for each problem of the config or the folder; nothing was
  written. Raises a ValueError if data or weights do not fit, a number was not finite, or the disk
  refuses a file; `run_signals.Interrupted` if a signal came before there was anything to save.
  """
  listening = isinstance(signals, run_signals.StopRequest)
  listener = contextlib.nullcontext(signals) if listening else run_signals.signals(signals)
  with listener as stop_request:
    try:
      return _run(config, Start(workdir, command, resume, stop_request), teacher)
    except run_signals.Stopped as early:
      return early.summary


def _run(config: ConfigDict, start: Start, teacher: Network | None) -> dict[str, Any]:
  raise_problems(check_structure, config)
  settings = resolve(config)
  if not is_single_process(settings.distributed):
    raise_problems(check_values, config)  # before waiting for others
    start.stop_request.defer()  # others wait for this process
  launch.initialize(**settings.distributed._asdict())
  start.stop_request.install_handlers()
  if jax.process_count() > 1:
    start.stop_request.defer()
    parallel.check_same_on_all(config_diff.fingerprint(settings.run.config), 'The config')
  with parallel.raise_on_all_processes():
    check(config, start, teacher)
  if jax.process_count() > 1 and settings.job != 'check':
    with parallel.raise_on_all_processes():
      stored = run_folder.read_stored(paths.expand_path(start.workdir, 'workdir'))
    parallel.check_same_on_all(hash_json(stored), f'The run in {start.workdir}')
  if settings.precision:
    jax.config.update('jax_default_matmul_precision', settings.precision)
  if settings.compilation_cache:
    jax.config.update(
        'jax_compilation_cache_dir', str(paths.expand_path(settings.compilation_cache)))
    compilation_cache.reset_cache()  # or JAX ignores the folder after its first compilation
  if settings.job == 'check':
    return preflight.run(settings, teacher)
  if settings.job == 'train':
    return supervised.run(settings, start)
  return distillation.run(settings, start, teacher)


def check(config: ConfigDict, start: Start, teacher: Network | None = None) -> None:
  """Raises an InvalidError with all problems of the config and the folder. Writes nothing."""
  raise_problems(check_structure, config)
  problems = find_problems(config, teacher)
  if config.job != 'check':
    _check_folder(resolve(config), start, problems)
  problems.raise_if_any()


def _check_folder(settings: Settings, start: Start, problems: Problems) -> None:
  """Collects problems of the folder, of the runs to begin from, and of resuming."""

  def read_folder():
    workdir = paths.expand_path(start.workdir, 'workdir')
    run_folder.check_place(workdir)
    return workdir, run_folder.read_stored(workdir)

  workdir, stored = problems.run(read_folder, field='workdir') or (None, {})
  unread = init_from.unread_sources(settings.init_from, stored, settings.control)
  for name, source in sorted(unread._asdict().items()):
    if source is not None:
      problems.run(init_from.source_path, name, source, field=f'init_from.{name}')
  identity = config_diff.run_identity(settings.run.config)
  problems.run(config_diff.config_changes, stored, identity, workdir, start.resume,
               problems.affect, reads=['workdir'], field='workdir')
