"""How several processes, on one machine or many, become one run: before JAX has looked for devices.

Each process starts the same program. They meet at a coordinator, which the first of them runs; from then on
`jax.devices()` are those of all, and `parallel` does the rest.
"""

import os
import re
import socket
import sys
import time

import jax

AUTO = 'auto'
# Where a cluster says how many processes it started together. SLURM's is that of a step: a batch script is one process,
# though SLURM_NTASKS may be more.
_COUNTS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'MEGASCALE_NUM_SLICES')
_HOSTS = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')  # With commas between.
_SHUTDOWN = 60  # Seconds that one which ends waits for the others, before all are ended.


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, timeout: int = 300
) -> None:
  """Joins the other processes of this run, if there are any; must come before anything asks JAX for devices.

  Without arguments they are looked for only where a cluster says that it started more than one process (SLURM's `srun`,
  Open MPI, TPU pods on Kubernetes), so that nobody waits for nobody. A second call changes nothing.

  Args:
    coordinator: 'host:port' of the first process, as all can reach it; 'auto': as JAX finds out itself, such as on TPU
      pods, which no environment variable tells.
    num_processes: How many; 1: by itself, whatever a cluster says.
    process_id: Which one this is, from 0.
    timeout: Seconds to wait for the others.

  Raises:
    ValueError: Only some arguments were given, or wrong ones; the coordinator cannot be reached; JAX has looked for
      devices before; or it runs with other processes than these.
  """
  given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
  detect = coordinator == AUTO or (set(given.values()) == {None} and started_together() > 1)
  if not detect:
    if set(given.values()) == {None} or (num_processes == 1 and process_id in (None, 0)):
      return
    _check(given)
  if jax.distributed.is_initialized():
    if not detect and (num_processes, process_id) != (jax.process_count(), jax.process_index()):
      raise ValueError(
          f'distributed has process {process_id} of {num_processes}, but this one runs as {jax.process_index()} of '
          f'{jax.process_count()} already.')
    return
  if detect:
    _join(initialization_timeout=timeout)
  else:
    left = _meet(coordinator, num_processes, process_id, timeout)
    _join(**{'coordinator_address': coordinator, 'num_processes': num_processes, 'process_id': process_id},
          initialization_timeout=left, cluster_detection_method='deactivate')


def started_together() -> int:
  """How many processes a cluster started with this one, by environment variables; 1 where there is none."""
  counts = [int(value) for name in _COUNTS if (value := os.environ.get(name, '')).isdecimal()]
  hosts = [os.environ[name].count(',') + 1 for name in _HOSTS if name in os.environ]
  return max([1, *counts, *hosts])


def _check(given: dict) -> None:
  lacking = [f'distributed.{name}' for name, value in given.items() if value is None]
  if lacking:
    there = ' and '.join(f'distributed.{name}' for name, value in given.items() if value is not None)
    raise ValueError(f'{" and ".join(lacking)} must be set as well, since {there} is.')
  coordinator, number, process = given.values()
  if not re.fullmatch(r'.+:\d{1,5}', coordinator):
    raise ValueError(f"distributed.coordinator is {coordinator!r}, must be 'host:port', or 'auto'.")
  if not 0 <= process < number:
    raise ValueError(f'distributed.process_id is {process}, must be in 0..{number - 1}, for {number} processes.')


def _meet(coordinator: str, number: int, process: int, timeout: int) -> int:
  """Finds out what JAX would abort for, without a word to catch; returns the seconds left."""
  host, port = coordinator.rsplit(':', 1)
  if process == 0:
    try:
      socket.create_server(('', int(port))).close()
    except (OSError, OverflowError) as error:
      raise ValueError(f'distributed.coordinator is {coordinator!r}, whose port cannot be opened: {error}.') from error
    print(f'The first of {number} processes waits at {coordinator} for the others, {timeout} s at most.',
          file=sys.stderr)
    return timeout
  last = time.monotonic() + timeout
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      return max(1, int(last - time.monotonic()))
    except (OSError, OverflowError) as error:
      if time.monotonic() > last:
        raise ValueError(
            f'distributed.coordinator is {coordinator!r}, which process {process} could not reach in {timeout} s: '
            f'{error}.') from error
      time.sleep(0.2)


def _join(**settings) -> None:
  try:
    jax.distributed.initialize(**settings, shutdown_timeout_seconds=_SHUTDOWN)
  except (RuntimeError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise ValueError(
        f'The processes of this run cannot meet: {reason} Set distributed.coordinator, num_processes and process_id; '
        'with distributed.num_processes=1 this process runs by itself.') from error
