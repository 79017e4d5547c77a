"""Collectives between processes: who writes, which rows are whose, errors that all raise together."""

import contextlib
import os
import secrets
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

_LONGEST = 1000  # Bytes of an error that processes tell each other.


def is_first() -> bool:
  """Whether this process is the one that writes and prints."""
  return jax.process_index() == 0


def process_shard() -> tuple[int, int]:
  """Which process this is, and of how many: the `shard` of `data.load`."""
  return jax.process_index(), jax.process_count()


def process_rows(total: int, process: int | None = None) -> slice:
  """The share of `total` rows that a process (None: this one) takes: none twice, and none is left."""
  process, processes = jax.process_index() if process is None else process, jax.process_count()
  return slice(total * process // processes, total * (process + 1) // processes)


def gather_rows(rows: np.ndarray, total: int) -> np.ndarray:
  """All `total` rows from the share of each process, in order. All must call it."""
  shares = [process_rows(total, process) for process in range(jax.process_count())]
  longest = max(share.stop - share.start for share in shares)
  padded = gather_processes(np.pad(rows, [(0, longest - len(rows))] + [(0, 0)] * (rows.ndim - 1)))
  return np.concatenate([found[:share.stop - share.start] for found, share in zip(padded, shares, strict=True)])


def gather_processes(array: np.ndarray) -> np.ndarray:
  """What each process gives, [P, ...], on all; of the same shape everywhere. All must call it."""
  array = np.asarray(array)
  if jax.process_count() == 1:
    return array[None]
  # As bytes, since JAX would make 32 bits of 64.
  found = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8))
  return np.ascontiguousarray(found).view(array.dtype).reshape(-1, *array.shape)


def _gather_texts(text: str) -> list[str]:
  """What each process says, on all."""
  padded = text.encode()[:_LONGEST].ljust(_LONGEST, b'\0')
  return [row.tobytes().rstrip(b'\0').decode(errors='ignore') for row in gather_processes(np.frombuffer(padded, np.uint8))]


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
  """At its end all processes wait for each other, and an error on one is one on all.

  Without, the others would wait for the one that failed. Nothing within may wait for other processes.

  Raises:
    ValueError: Names the first process that failed, on those that did not.
  """
  error = None
  try:
    yield
  except Exception as found:
    if jax.process_count() == 1:
      raise
    error = found
  if jax.process_count() == 1:
    return
  kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
  texts = _gather_texts('' if error is None else f'{kind}{error}')
  if error is not None:
    raise error
  failed = [(process, text) for process, text in enumerate(texts) if text]
  if failed:
    raise ValueError(f'Process {failed[0][0]} of {len(texts)}: {failed[0][1]}')


def check_same_on_all(text: str, what: str) -> None:
  """Raises a ValueError on all processes if `text` differs between them; `what` says what it stands for."""
  texts = _gather_texts(text) if jax.process_count() > 1 else [text]
  other = next((process for process, found in enumerate(texts) if found != texts[0]), None)
  if other is not None:
    raise ValueError(f'{what} must be the same in all {len(texts)} processes, but differs between 0 and {other}.')


def check_shared_folder(directory: str) -> None:
  """Raises a ValueError on all processes if one does not see what the first writes to a folder."""
  if jax.process_count() == 1:
    return
  # A name that no file system has been asked for before, and could remember as missing.
  path = os.path.join(directory, f'.shared-{gather_processes(np.int64(secrets.randbits(60)))[0]}')
  with raise_on_all_processes():
    if is_first():
      open(path, 'x').close()
  with raise_on_all_processes():
    if not os.path.exists(path):
      raise ValueError(f'{directory} must be on a file system that all processes see.')
  if is_first():
    os.remove(path)
