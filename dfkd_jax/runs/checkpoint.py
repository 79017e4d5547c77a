"""Saving and resuming a run: a thin layer over Orbax, and the only file that knows Orbax.

A checkpoint is a folder `<directory>/<step>` with two parts: `state`, all leaves of a pytree under their paths
('student/params/stem/kernel'), and `meta`, one JSON object with what is not an array. Beside the caller's meta data the
JSON holds the format and each leaf's shape and dtype, so that what does not fit is named before an array is read, and
checksums, since TensorStore does not notice a flipped bit.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dfkd_jax import parallel
from dfkd_jax.runs import checkpoint_format, orbax_errors
from dfkd_jax.types import PyTree

FORMAT = 1  # Of the meta data; another one is refused.


class DamagedError(ValueError):
  """A checkpoint cannot be read, or is not what was saved."""


class Checkpoints:
  """The checkpoints of one run, written in the background; a context manager.

  The arrays given to `save` may be donated or overwritten as soon as it returns: device arrays are copied to the host
  first (on CPU the runtime refuses to reuse a buffer that is still being written), NumPy arrays are copied. A save that
  was cut off leaves a folder with another name, which is ignored and removed by the next run.

  Where the latest checkpoint is damaged, the one before it is taken, and so on; `damaged` says which were passed over,
  and why. Every error is a ValueError of one line.

  Of several processes each writes and reads its part of the arrays, and all must call the same methods in the same
  order, but for reading only, which each does by itself.

  Args:
    directory: Made if missing; on a file system that all processes see.
    max_to_keep: The latest so many stay; None keeps all.
    read_only: Make, change and remove nothing; `save` is refused.

  Raises:
    ValueError: `directory` cannot be written, is not the same for all processes, or does not exist and is to be read
      only.
  """

  def __init__(self, directory: str | os.PathLike, *, max_to_keep: int | None = 2, read_only: bool = False):
    self.directory = os.path.abspath(directory)
    if max_to_keep is not None and max_to_keep < 1:
      raise ValueError(f'max_to_keep is {max_to_keep}; it must be at least 1, or None to keep all.')
    orbax_errors.check_directory(self.directory, read_only)
    orbax_errors.silence_orbax()
    self._read_only = read_only
    self.damaged: dict[int, str] = {}  # Steps that could not be read, with the reason.
    options = ocp.CheckpointManagerOptions(
      max_to_keep=max_to_keep, create=False, cleanup_tmp_directories=not read_only, read_only=read_only,
      multiprocessing_options=_alone() if read_only else ocp.options.MultiprocessingOptions()
    )
    with self._storage_errors('look'):
      self._manager = ocp.CheckpointManager(self.directory, options=options)

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, error, traceback) -> None:
    try:
      self.close()
    except ValueError:
      if error is None:  # Else it would hide what went wrong first.
        raise

  def save(self, step: int, state: PyTree, meta: dict) -> None:
    """Starts writing a checkpoint, after the one before has been written.

    Args:
      step: Above every step that is there already.
      state: JAX or NumPy arrays in any pytree; NumPy scalars become arrays of no axes.
      meta: JSON values: config and its hash, counters, the best so far.

    Raises:
      ValueError: `step` is not above the latest, a leaf is not an array, `meta` is not JSON, or the disk refuses this
        checkpoint or refused the one before.
    """
    if self._read_only:
      raise ValueError(f'{self.directory} was opened to be read only; step {step} is not saved.')
    leaves, _ = checkpoint_format.flatten(state)
    entry = {
        'format': FORMAT, 'leaves': checkpoint_format.specs(leaves), 'checksums': checkpoint_format.checksums(leaves), 'meta': meta}
    entry['checksum'] = checkpoint_format.checksum_of(entry)
    arrays = {path: leaf for path, leaf in leaves.items() if leaf.size}  # Orbax refuses arrays without elements.
    self.wait()
    with self._storage_errors(f'save step {step}', kept=True):
      saved = self._manager.save(
        step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(entry))
      )
    if not saved:
      raise ValueError(f'Step {step} is not saved: {self.directory} has step {self._manager.latest_step()} already.')

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, in ascending order."""
    self.wait()
    return [step for step in self._all_steps() if self._is_complete(step)]

  def any(self) -> bool:
    """Whether there is a checkpoint, in whatever state."""
    return bool(self._all_steps())

  def latest(self) -> int | None:
    """The latest step with a complete checkpoint; None if there is none."""
    return max(self.steps(), default=None)

  def meta(self, step: int | None = None) -> dict:
    """The `meta` given to `save`, from the JSON alone; tuples come back as lists.

    Args:
      step: None: the latest that can be read.

    Raises:
      ValueError: There is no such checkpoint, or it is damaged or of another format.
    """
    if step is not None:
      return self._entry(self._existing(step))['meta']
    return self._latest_readable(lambda step: self._entry(step)['meta'])

  def restore(
      self, template: PyTree | Callable[[set[str]], PyTree], step: int | None = None) -> tuple[PyTree, dict]:
    """Reads a checkpoint into the structure of `template`.

    Args:
      template: As the state saved, or a function of the first parts of its paths, such as {'student', 'best'}, that
        gives it: arrays or `jax.ShapeDtypeStruct`s. A JAX array takes the place (sharding) of its
        counterpart here, whatever it was saved from, or the first device where that has none; a NumPy array stays one.
      step: None: the latest that can be read. Those passed over are kept, under names such as 'damaged-8'.

    Returns:
      State and meta data.

    Raises:
      ValueError: There is no such checkpoint, it is damaged, or it is of another architecture: the first leaf that is
        missing, is left over, or has another shape or dtype is named with both.
    """
    if step is not None:
      return self._restore(template, self._existing(step))
    found = self._latest_readable(lambda step: self._restore(template, step))
    self._set_aside()
    return found

  def _restore(self, template: PyTree | Callable[[set[str]], PyTree], step: int) -> tuple[PyTree, dict]:
    entry = self._entry(step)
    if callable(template):
      template = template({path.split('/')[0] for path, _, _ in entry['leaves']})
    leaves, structure = checkpoint_format.flatten(template)
    self._check_fit(step, {path: (tuple(shape), dtype) for path, shape, dtype in entry['leaves']}, leaves)
    targets = {path: checkpoint_format.target(leaf) for path, leaf in leaves.items()}
    wanted = ocp.args.StandardRestore({path: target for path, target in targets.items() if leaves[path].size})
    with self._storage_errors(f'read step {step}', DamagedError):
      arrays = self._manager.restore(step, args=ocp.args.Composite(state=wanted))['state']
    restored = [arrays[path] if path in arrays else checkpoint_format.empty(target) for path, target in targets.items()]
    for (path, leaf), array in zip(leaves.items(), restored, strict=True):
      if array.dtype != leaf.dtype:
        raise ValueError(f'{path!r} is {leaf.dtype}, which JAX keeps only where jax_enable_x64 is set.')
      wanted = entry.get('checksums', {}).get(path)
      if wanted is not None and checkpoint_format.checksum(array) not in (None, wanted):
        raise DamagedError(f'Cannot read step {step} in {self.directory}: {path!r} has other bytes than were saved.')
    return jax.tree.unflatten(structure, restored), entry['meta']

  def wait(self) -> None:
    """Returns when the background write is done.

    Raises:
      ValueError: The write failed.
    """
    with self._storage_errors('save', kept=True):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the background write, and ends it; harmless a second time.

    Raises:
      ValueError: The write failed.
    """
    with self._storage_errors('save', kept=True):
      self._manager.close()

  def _all_steps(self) -> list[int]:
    self.wait()
    return sorted(self._manager.all_steps())

  def _is_complete(self, step: int) -> bool:
    return os.path.isfile(os.path.join(self.directory, str(step), 'meta', 'metadata'))

  def _latest_readable(self, read: Callable[[int], Any]) -> Any:
    """What is read of the latest checkpoint that lets itself be read, by all processes."""
    steps = self._all_steps()
    for step in reversed(steps):
      error = found = None
      try:
        if not self._is_complete(step):
          raise DamagedError(f'Cannot read step {step} in {self.directory}: it is incomplete.')
        found = read(step)
      except Exception as caught:
        error = caught
      worst = self._worst(0 if error is None else 1 if isinstance(error, DamagedError) else 2)
      if worst == 0:
        return found
      if worst == 2:  # It may be whole, and read another time.
        raise ValueError(f'Cannot read step {step} in {self.directory} on another process.') if error is None else error
      self.damaged[step] = str(error or f'Cannot read step {step} in {self.directory} on another process.')
    if not steps:
      raise ValueError(f'There is no checkpoint in {self.directory}.')
    raise DamagedError(f'No checkpoint of {steps} can be read, of which nothing was changed: {self.damaged[steps[-1]]}')

  def _worst(self, own: int) -> int:
    """The largest of what the processes have that read together; so that none waits for one that has failed."""
    return own if self._read_only else int(parallel.gather_processes(np.int64(own)).max())

  def _set_aside(self) -> None:
    """Gives damaged steps other names, so that they can be saved again, and looked into."""
    if self._read_only or not self.damaged:
      return
    with parallel.raise_on_all_processes(), self._storage_errors('set a damaged checkpoint aside'):
      for step in self.damaged if parallel.is_first() else ():
        source = os.path.join(self.directory, str(step))
        suffixes = itertools.chain([''], (f'-{number}' for number in itertools.count(2)))
        targets = (os.path.join(self.directory, f'damaged-{step}{suffix}') for suffix in suffixes)
        if os.path.isdir(source):
          os.rename(source, next(target for target in targets if not os.path.exists(target)))
    self._manager.reload()

  def _existing(self, step: int) -> int:
    steps = self.steps()
    if not steps:
      raise ValueError(f'There is no checkpoint in {self.directory}.')
    if step not in steps:
      raise ValueError(f'There is no checkpoint of step {step} in {self.directory}, only of {steps}.')
    return step

  def _entry(self, step: int) -> dict:
    with self._storage_errors(f'read step {step}', DamagedError):
      entry = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
    if not isinstance(entry, dict) or not {'format', 'leaves', 'meta'} <= entry.keys():
      raise DamagedError(f'Step {step} in {self.directory} is not a checkpoint of this program.')
    if entry['format'] != FORMAT:
      raise ValueError(f'Step {step} in {self.directory} has format {entry["format"]}; this version reads {FORMAT}.')
    if entry.pop('checksum', None) not in (None, checkpoint_format.checksum_of(entry)):
      raise DamagedError(f'Cannot read step {step} in {self.directory}: its meta data is not what was saved.')
    return entry

  def _check_fit(self, step: int, stored: dict[str, tuple], leaves: dict) -> None:
    wanted = {path: (tuple(shape), dtype) for path, shape, dtype in checkpoint_format.specs(leaves)}
    differing = [path for path in wanted | stored if wanted.get(path) != stored.get(path)]
    if differing:
      path = differing[0]
      more = f' (and {len(differing) - 1} more)' if len(differing) > 1 else ''
      raise ValueError(
        f'Checkpoint of another architecture, step {step} in {self.directory}: {path!r} is '
        f'{checkpoint_format.describe(stored.get(path))} there, {checkpoint_format.describe(wanted.get(path))} here{more}.'
      )

  @contextlib.contextmanager
  def _storage_errors(
      self, action: str, kind: type[ValueError] = ValueError, kept: bool = False) -> Iterator[None]:
    """Whatever Orbax or the disk has to say, in one line; and which checkpoint is `kept`, if that is asked for."""
    try:
      yield
    except Exception as error:
      kind = ValueError if orbax_errors.is_transient(error) else kind
      text = f'Cannot {action} in {self.directory}: {orbax_errors.reason(error)}'
      left = self._kept() if kept and not self._read_only else ''
      raise kind(f'{text.rstrip(".")}. {left}' if left else text) from error

  def _kept(self) -> str:
    """What is left where a checkpoint could not be written, as the folder has it."""
    try:
      steps = [int(name) for name in os.listdir(self.directory) if name.isdecimal() and self._is_complete(int(name))]
    except OSError:  # It is gone, or no folder any more.
      return ''
    return f'The checkpoint of step {max(steps)} is kept.' if steps else 'No checkpoint was written yet.'


def _alone() -> ocp.options.MultiprocessingOptions:
  """One of several processes that waits for no other."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(
      primary_host=process, active_processes={process}, barrier_sync_key_prefix=f'alone{process}')
