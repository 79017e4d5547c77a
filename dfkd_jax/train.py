"""Data-free distillation as a run: rounds of synthesis and of student steps, evaluation, checkpoints, report."""

import contextlib
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from dfkd_jax import parallel, paths
from dfkd_jax.config import build, check_fields, records
from dfkd_jax.config import check as config_check
from dfkd_jax.jobs import preflight, supervised
from dfkd_jax.jobs.distillation import run_distillation
from dfkd_jax.models.network import Network
from dfkd_jax.parallel import launch
from dfkd_jax.runs import checkpoint_format, config_diff
from dfkd_jax.runs import folder as run_folder
from dfkd_jax.runs import signals as run_signals


def run(
    config: build.Config, workdir: str, command: str | None = None, teacher: Network | None = None, *,
    resume: str | None = None, signals: bool | run_signals.StopRequest = False,
) -> dict[str, Any]:
  """Runs a config; results go to `workdir`, and come back as the summary.

  The same config in the same folder goes on where it stopped, bit for bit; if it had come to its end, its summary is
  returned. One that was asked to end early returns what `stopping.Stopped` says, and has saved all it did.
  Of several processes (`processes.initialize`) all must call this, with the same config and a folder that all see.

  Args:
    config: With the fields of configs/common.py.
    workdir: Made if missing.
    command: That started the run, for the record.
    teacher: A network of yours (`models.bind`), in the place of the one that the config's section `teacher` names.
    resume: None; 'force', to go on in a folder that holds a run of another config; or 'force:FIELD,...', of one that
      differs in these alone. What was changed, and after which round, is kept in the summary.
    signals: Whether SIGTERM and SIGINT are listened to, so that a run ends after its round, and is saved; or what
      `stopping.signals` gave, where that listens already.

  Raises:
    stopping.Interrupted: A KeyboardInterrupt: a signal was listened to, and came before there was anything to save.
    ValueError: Something in the config, the data or the weights does not fit; in one line, or where the config has
      several mistakes as `validation.InvalidError` with one for each; nothing was written. Or a number was not finite,
      or the disk refuses a file.
  """
  with contextlib.ExitStack() as stack:
    asked = stack.enter_context(run_signals.signals(signals)) if isinstance(signals, bool) else signals
    try:
      return _run(config, workdir, command, teacher, resume, asked)
    except run_signals.Stopped as early:
      return early.summary


def _run(
    config: build.Config, workdir: str, command: str | None, teacher: Network | None, resume: str | None,
    asked: run_signals.StopRequest) -> dict[str, Any]:
  if not config_check.alone(config):
    check_fields.check(config)  # Before anybody waits for others.
    asked.defer()  # As they will for this one.
  launch.initialize(**config.distributed.to_dict())
  asked.install_handlers()
  if jax.process_count() > 1:
    asked.defer()
    parallel.check_same_on_all(config_diff.fingerprint(records.to_json(config)), 'The config')
  with parallel.raise_on_all_processes():
    config_check.check(config, workdir, teacher, resume)
  if jax.process_count() > 1 and config.job != 'check':  # Else some would go on with it, and others not.
    with parallel.raise_on_all_processes():
      there = run_folder.read_stored(paths.expand_path(workdir, 'workdir'))
    parallel.check_same_on_all(checkpoint_format.hash_json(there), f'What is seen of {workdir}')
  if config.precision:
    jax.config.update('jax_default_matmul_precision', config.precision)
  if config.compilation_cache:
    jax.config.update('jax_compilation_cache_dir', str(paths.expand_path(config.compilation_cache)))
    compilation_cache.reset_cache()  # Else it is ignored where anything was compiled before.
  if config.job == 'check':
    return preflight.run(config, workdir, command, teacher)
  if config.job == 'train':
    return supervised.run(config, workdir, command, resume, asked)
  return run_distillation(config, workdir, command, teacher, resume, asked)
