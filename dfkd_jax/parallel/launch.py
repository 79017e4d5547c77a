"""Joins several processes, on one machine or many, before JAX looks for devices.

Each process starts the same program. They meet at a coordinator, which the first of them runs.
Afterwards `jax.devices()` are the devices of all processes.
"""

import atexit
import os
import re
import socket
import sys
import threading

import jax

# Environment variables with the number of processes that a cluster started together. SLURM counts
# them by step: a batch script is one process, even if SLURM_NTASKS is larger.
_COUNTS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'MEGASCALE_NUM_SLICES')
_HOSTS = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')  # Comma-separated.


def initialize(coordinator: str | None = None, num_processes: int | None = None,
               process_id: int | None = None, timeout: int = 300) -> None:
  """Joins the other processes of this run, if any. Call it before JAX looks for devices.

  Without arguments, it joins others only if a cluster reports that it started more than one
  process (SLURM's `srun`, Open MPI, TPU pods on Kubernetes). A second call changes nothing.

  `coordinator` is 'host:port' of the first process, reachable from all. 'auto' lets JAX detect it,
  such as on TPU pods, which set no environment variable. `num_processes=1` runs alone, even on a
  cluster. `process_id` counts from 0. Waits at most `timeout` seconds for the others. Raises a
  ValueError if they do not join, JAX has looked for devices, or arguments are missing, wrong, or
  of another process than in an earlier call.
  """
  settings = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
  is_empty = set(settings.values()) == {None}
  detect = coordinator == 'auto' or (is_empty and started_together() > 1)
  if not detect:
    if is_empty or (num_processes == 1 and process_id in (None, 0)):
      return
    _check_settings(settings)
  if jax.distributed.is_initialized():
    index, count = jax.process_index(), jax.process_count()
    if not detect and (num_processes, process_id) != (count, index):
      raise ValueError(f'distributed has process {process_id} of {num_processes}, but this one '
                       f'runs as {index} of {count} already.')
    return
  if process_id == 0 and not detect:
    try:  # JAX crashes if it cannot open the coordinator's port.
      socket.create_server(('', int(coordinator.rsplit(':', 1)[1]))).close()
    except (OSError, OverflowError) as error:
      raise ValueError(f'distributed.coordinator is {coordinator!r}, but its port cannot be '
                       f'opened: {error}.') from error
    print(f'The first of {num_processes} processes waits at {coordinator} for the others, '
          f'{timeout} s at most.', file=sys.stderr)
  _join(timeout, {} if detect else {
      'coordinator_address': coordinator, 'num_processes': num_processes,
      'process_id': process_id, 'cluster_detection_method': 'deactivate'})


def started_together() -> int:
  """Number of processes that a cluster started with this one, by environment variables, or 1."""
  counts = [int(value) for name in _COUNTS if (value := os.environ.get(name, '')).isdecimal()]
  hosts = [os.environ[name].count(',') + 1 for name in _HOSTS if name in os.environ]
  return max([1, *counts, *hosts])


def _check_settings(settings: dict) -> None:
  missing, present = (
      ' and '.join(f'distributed.{name}' for name in settings if (settings[name] is None) == absent)
      for absent in (True, False))
  if missing:
    raise ValueError(f'{missing} must be set as well, since {present} is.')
  coordinator, count, index = settings.values()
  if not re.fullmatch(r'.+:\d{1,5}', coordinator):
    raise ValueError(f"distributed.coordinator is {coordinator!r}, must be 'host:port', or 'auto'.")
  if not 0 <= index < count:
    raise ValueError(
        f'distributed.process_id is {index}, must be in 0..{count - 1}, for {count} processes.')


def _join(timeout: int, settings: dict) -> None:
  """Calls `jax.distributed.initialize` in a thread, and stops waiting for it after `timeout`."""
  errors = []

  def join():
    try:
      jax.distributed.initialize(  # JAX's own timeout, a day longer, would abort the process.
          **settings, initialization_timeout=timeout + 86_400, shutdown_timeout_seconds=60)
    except Exception as error:
      errors.append(error)

  thread = threading.Thread(target=join, daemon=True)
  thread.start()
  try:
    thread.join(timeout)
  finally:
    if thread.is_alive():  # At its end, JAX's coordinator would log many lines to stderr.
      atexit.register(os.dup2, os.open(os.devnull, os.O_WRONLY), 2)
  if thread.is_alive():
    place = f' at {settings["coordinator_address"]}' if settings else ''
    errors.append(TimeoutError(f'others did not join{place} within {timeout} s.'))
  if errors:
    raise ValueError(
        f'The processes of this run cannot meet: {str(errors[0]).splitlines()[0]} Set '
        'distributed.coordinator, num_processes and process_id; with distributed.num_processes=1 '
        'this process runs alone.') from errors[0]
