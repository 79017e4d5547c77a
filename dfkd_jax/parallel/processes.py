"""Collectives between processes: shares of rows, gathering, and errors that all processes raise."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

_MAX_ERROR = 1000  # Bytes of an error that processes send each other.


def is_first() -> bool:
  """Whether this process is the one that writes and prints."""
  return jax.process_index() == 0


def process_shard() -> tuple[int, int]:
  """Index of this process and number of processes, for `shard` of `data.load`."""
  return jax.process_index(), jax.process_count()


def process_rows(total: int, process: int | None = None) -> slice:
  """Share of `total` rows of a process (None: this one). The shares partition the rows."""
  index, count = jax.process_index() if process is None else process, jax.process_count()
  return slice(total * index // count, total * (index + 1) // count)


def gather_rows(rows: np.ndarray, total: int) -> np.ndarray:
  """Gathers the share of each process into all `total` rows, in order. All must call it."""
  shares = [process_rows(total, process) for process in range(jax.process_count())]
  sizes = [share.stop - share.start for share in shares]
  gathered = gather_processes(
      np.pad(rows, [(0, max(sizes) - len(rows))] + [(0, 0)] * (rows.ndim - 1)))
  return np.concatenate([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def gather_processes(array: np.ndarray) -> np.ndarray:
  """Gathers an array of the same shape from each process to [P, ...]. All must call it."""
  array = np.asarray(array)
  if jax.process_count() == 1:
    return array[None]
  # As bytes, since JAX would turn 64 bits into 32.
  gathered = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8))
  return np.ascontiguousarray(gathered).view(array.dtype).reshape(-1, *array.shape)


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
  """Waits for all processes at the end of this context, and raises on all if one failed.

  Otherwise, the others would wait for it. They raise a ValueError that names it. Code within this
  context must not wait for other processes.
  """
  if jax.process_count() == 1:
    yield
    return
  failure, text = None, ''
  try:
    yield
  except Exception as error:
    failure, kind = error, '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
    text = f'{kind}{error}'
  padded = text.encode()[:_MAX_ERROR].ljust(_MAX_ERROR, b'\0')
  rows = gather_processes(np.frombuffer(padded, np.uint8))
  if failure is not None:
    raise failure
  for process, row in enumerate(rows):
    if row.any():
      message = row.tobytes().rstrip(b'\0').decode(errors='ignore')
      raise ValueError(f'Process {process} of {len(rows)}: {message}')


def check_same_on_all(text: str, name: str) -> None:
  """Raises a ValueError on all processes if `text`, called `name`, differs between them."""
  digests = gather_processes(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8))
  if (digests != digests[0]).any():
    raise ValueError(f'{name} must be the same in all {len(digests)} processes, but differs.')


def check_shared_folder(directory: str) -> None:
  """Raises a ValueError on all processes if one does not see a file that the first one writes."""
  if jax.process_count() == 1:
    return
  # A new name, since a file system may remember that an earlier one was missing.
  path = os.path.join(directory, f'.shared-{gather_processes(np.int64(secrets.randbits(60)))[0]}')
  with raise_on_all_processes():
    if is_first():
      open(path, 'x').close()
  with raise_on_all_processes():
    if not os.path.exists(path):
      raise ValueError(f'{directory} must be on a file system that all processes see.')
  if is_first():
    os.remove(path)
