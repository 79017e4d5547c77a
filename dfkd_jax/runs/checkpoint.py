"""Saving and restoring pytrees of arrays: a thin layer over Orbax, and its only user.

A checkpoint is a folder `<directory>/<step>` with the arrays by path in `state`, and one JSON
object in `meta` (see checkpoint_format.py).
"""

import contextlib
import itertools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dfkd_jax import parallel
from dfkd_jax.runs import checkpoint_format
from dfkd_jax.runs.checkpoint_format import DamagedError, storage_errors
from dfkd_jax.types import PyTree


def saved_steps(directory: str | os.PathLike) -> list[int]:
  """Returns the steps with a checkpoint in ascending order, damaged ones included."""
  if not os.path.isdir(directory):
    return []
  return sorted(int(name) for name in os.listdir(directory) if name.isdecimal())


def complete_steps(directory: str | os.PathLike) -> list[int]:
  """Returns the steps with a complete checkpoint in ascending order."""
  return [step for step in saved_steps(directory)
          if checkpoint_format.entry_path(directory, step).is_file()]


def read_meta(directory: str | os.PathLike) -> dict[str, Any]:
  """Returns the meta data of the latest checkpoint that can be read; changes nothing.

  Raises ValueError if there is none, or it has another format.
  """
  read = lambda step: checkpoint_format.read_entry(directory, step)['meta']
  return _read_latest(directory, saved_steps(directory), read)[0]


class Checkpoints:
  """The latest `max_to_keep` checkpoints (None: all) in one folder; a context manager.

  They are written in the background: arrays given to `save` may be donated or overwritten once it
  returns. All processes must see the folder, and call the same methods in the same order; each
  writes and reads its part of the arrays. Raises ValueError if the folder cannot be written.
  """

  def __init__(self, directory: str | os.PathLike, *, max_to_keep: int | None = 2):
    self.directory = os.path.abspath(directory)
    self.damaged: dict[int, str] = {}  # steps that the last `restore` passed over: reasons
    with parallel.raise_on_all_processes(), storage_errors(f'write to {self.directory}'):
      os.makedirs(self.directory, exist_ok=True)
    parallel.check_shared_folder(self.directory)
    with storage_errors(f'open {self.directory}'):
      self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
          max_to_keep=max_to_keep, create=False, cleanup_tmp_directories=True))

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, error_type, error, traceback) -> None:
    try:
      self.close()
    except ValueError:
      if error is None:  # Otherwise it would hide the first error.
        raise

  def save(self, step: int, state: PyTree, meta: dict) -> None:
    """Starts to write arrays and JSON values as a checkpoint, once the one before is written.

    Raises ValueError if `step` is not above all saved ones, a leaf is not an array, or the disk
    refuses this checkpoint or refused the one before; TypeError if `meta` is not JSON.
    """
    leaves, _ = checkpoint_format.flatten(state)
    entry = checkpoint_format.make_entry(leaves, meta)
    self.wait()
    with self._save_errors(f'save step {step}'):
      os.listdir(self.directory)  # If the folder is gone, Orbax would wait for five minutes.
      is_saved = self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(entry)))
    if not is_saved:
      raise ValueError(f'Step {step} is not saved: {self.directory} has step '
                       f'{self._manager.latest_step()} already.')

  def all_steps(self) -> list[int]:
    """Returns the steps with a checkpoint in ascending order, damaged ones included."""
    self.wait()
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """Returns the latest step with a complete checkpoint; None if there is none."""
    self.wait()
    return max(complete_steps(self.directory), default=None)

  def restore(self, template: PyTree, step: int | None = None, *,
              optional: dict[str, PyTree] | None = None) -> tuple[PyTree, dict]:
    """Returns the state in a checkpoint, with the structure of `template`, and its meta data.

    If the latest checkpoint is damaged, renames it to 'damaged-<step>' and reads the one before,
    and so on; a `step` is read itself. Raises ValueError if there is none that can be read, or it
    is of another architecture.

    Args:
      template: Arrays or `jax.ShapeDtypeStruct`s. A JAX array is placed as in the template, or on
        the first device if that has no sharding. A NumPy array stays one.
      optional: Parts that are added to the dict `template` if the checkpoint has them.
    """
    read = lambda step: self._read(step, template, optional or {})
    if step is not None:
      return read(step)
    worst_status = lambda status: int(parallel.gather_processes(np.int64(status)).max())
    result, self.damaged = _read_latest(self.directory, self.all_steps(), read, worst_status)
    if not self.damaged:
      return result
    with parallel.raise_on_all_processes(), storage_errors(
        f'set a damaged checkpoint aside in {self.directory}'):
      for step in self.damaged if parallel.is_first() else ():
        source = os.path.join(self.directory, str(step))
        suffixes = itertools.chain([''], (f'-{number}' for number in itertools.count(2)))
        targets = (os.path.join(self.directory, f'damaged-{step}{suffix}') for suffix in suffixes)
        if os.path.isdir(source):
          os.rename(source, next(path for path in targets if not os.path.exists(path)))
    self._manager.reload()
    return result

  def wait(self) -> None:
    """Waits for the background write. Raises ValueError if it failed."""
    with self._save_errors('save'):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, as `wait` does. A second call does nothing."""
    with self._save_errors('save'):
      self._manager.close()

  def _read(self, step: int, template: PyTree, optional: dict[str, PyTree]) -> tuple[PyTree, dict]:
    where = f'step {step} in {self.directory}'
    entry = checkpoint_format.read_entry(self.directory, step)
    saved = {path: (tuple(shape), dtype) for path, shape, dtype in entry['leaves']}
    parts = {path.split('/')[0] for path in saved}
    if optional:
      template = template | {name: part for name, part in optional.items() if name in parts}
    leaves, structure = checkpoint_format.flatten(template)
    checkpoint_format.check_architecture(where, saved, leaves)
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {path: leaf if isinstance(leaf, np.ndarray) else jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding or first) for path, leaf in leaves.items()}
    with storage_errors(f'read {where}', DamagedError):
      arrays = self._manager.restore(
          step, args=ocp.args.Composite(state=ocp.args.StandardRestore(targets)))['state']
    for path, saved_checksum in entry.get('checksums', {}).items():
      if checkpoint_format.checksum(arrays[path]) not in (None, saved_checksum):
        raise DamagedError(f'Cannot read {where}: {path!r} has other bytes than were saved.')
    return jax.tree.unflatten(structure, [arrays[path] for path in leaves]), entry['meta']

  def _save_errors(self, action: str) -> contextlib.AbstractContextManager[None]:

    def advice():  # after the error, since a write in the background may have ended meanwhile
      with contextlib.suppress(OSError):
        if steps := complete_steps(self.directory):
          return f'The checkpoint of step {max(steps)} is kept.'
      return 'There is no checkpoint yet.'

    return storage_errors(f'{action} in {self.directory}', advice=advice)


def _read_latest(directory: str | os.PathLike, steps: list[int], read: Callable[[int], Any],
                 worst_status: Callable[[int], int] = int) -> tuple[Any, dict[int, str]]:
  """Returns `read(step)` of the latest step that can be read, and why later ones cannot.

  `worst_status` returns the largest status of all processes: 0 read, 1 damaged, 2 another error.
  All processes then take the same step, and none waits for one that has failed.
  """
  damaged = {}
  for step in reversed(steps):
    result, error = None, ValueError(f'Cannot read step {step} in {directory} on another process.')
    try:
      result, status = read(step), 0
    except Exception as caught:
      error, status = caught, 1 if isinstance(caught, DamagedError) else 2
    status = worst_status(status)
    if status == 0:
      return result, damaged
    if status == 2:  # The checkpoint may be whole, and readable later.
      raise error
    damaged[step] = str(error)
  if not steps:
    raise ValueError(f'There is no checkpoint in {directory}.')
  raise DamagedError(
      f'No checkpoint of {steps} can be read. Nothing was changed. {damaged[steps[-1]]}')
