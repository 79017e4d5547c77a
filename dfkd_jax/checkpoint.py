"""Saving and resuming a run: a thin layer over Orbax, and the only file that knows Orbax.

A checkpoint is a folder `<directory>/<step>` with two parts: `state`, all leaves of a pytree under their paths
('student/params/stem/kernel'), and `meta`, one JSON object with what is not an array. Beside the caller's meta data the
JSON holds the format and each leaf's shape and dtype, so that what does not fit is named before an array is read.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp

from dfkd_jax import parallel
from dfkd_jax.types import PyTree

FORMAT = 1  # Of the meta data; another one is refused.


def config_hash(config: dict) -> str:
  """First 16 hexadecimal digits of the SHA-256 of a config, whatever the order of its keys.

  Args:
    config: Nested dict of JSON values; tuples count as lists.

  Raises:
    ValueError: A value is not JSON.
  """
  return hashlib.sha256(_canonical(config, 'config').encode()).hexdigest()[:16]


class Checkpoints:
  """The checkpoints of one run, written in the background; a context manager.

  The arrays given to `save` may be donated or overwritten as soon as it returns: device arrays are copied to the host
  first (on CPU the runtime refuses to reuse a buffer that is still being written), NumPy arrays are copied. A save that
  was cut off leaves a folder with another name, which is ignored and removed by the next run.

  Every error is a ValueError of one line.

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
    _check_directory(self.directory, read_only)
    _silence_orbax()
    self._read_only = read_only
    options = ocp.CheckpointManagerOptions(
      max_to_keep=max_to_keep, create=False, cleanup_tmp_directories=not read_only, read_only=read_only,
      multiprocessing_options=_alone() if read_only else ocp.options.MultiprocessingOptions()
    )
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
    leaves, _ = _flatten(state)
    entry = {'format': FORMAT, 'leaves': _specs(leaves), 'meta': meta}
    _canonical(meta, 'meta data of a checkpoint')
    arrays = {path: leaf for path, leaf in leaves.items() if leaf.size}  # Orbax refuses arrays without elements.
    self.wait()
    with self._storage_errors(f'save step {step}'):
      saved = self._manager.save(
        step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(entry))
      )
    if not saved:
      raise ValueError(f'Step {step} is not saved: {self.directory} has step {self._manager.latest_step()} already.')

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, in ascending order."""
    self.wait()
    found = sorted(self._manager.all_steps())
    return [step for step in found if os.path.isfile(os.path.join(self.directory, str(step), 'meta', 'metadata'))]

  def latest(self) -> int | None:
    """The latest step with a complete checkpoint; None if there is none."""
    return max(self.steps(), default=None)

  def meta(self, step: int | None = None) -> dict:
    """The `meta` given to `save`, from the JSON alone; tuples come back as lists.

    Args:
      step: The latest if None.

    Raises:
      ValueError: There is no such checkpoint, or it is damaged or of another format.
    """
    return self._entry(self._existing(step))['meta']

  def restore(self, template: PyTree, step: int | None = None) -> tuple[PyTree, dict]:
    """Reads a checkpoint into the structure of `template`.

    Args:
      template: As the state saved: arrays or `jax.ShapeDtypeStruct`s. A JAX array takes the place (sharding) of its
        counterpart here, whatever it was saved from, or the first device where that has none; a NumPy array stays one.
      step: The latest if None.

    Returns:
      State and meta data.

    Raises:
      ValueError: There is no such checkpoint, it is damaged, or it is of another architecture: the first leaf that is
        missing, is left over, or has another shape or dtype is named with both.
    """
    step = self._existing(step)
    entry = self._entry(step)
    leaves, structure = _flatten(template)
    self._check_fit(step, {path: (tuple(shape), dtype) for path, shape, dtype in entry['leaves']}, leaves)
    targets = {path: _target(leaf) for path, leaf in leaves.items()}
    wanted = ocp.args.StandardRestore({path: target for path, target in targets.items() if leaves[path].size})
    with self._storage_errors(f'read step {step}'):
      arrays = self._manager.restore(step, args=ocp.args.Composite(state=wanted))['state']
    restored = [arrays[path] if path in arrays else _empty(target) for path, target in targets.items()]
    for (path, leaf), array in zip(leaves.items(), restored, strict=True):
      if array.dtype != leaf.dtype:
        raise ValueError(f'{path!r} is {leaf.dtype}, which JAX keeps only where jax_enable_x64 is set.')
    return jax.tree.unflatten(structure, restored), entry['meta']

  def wait(self) -> None:
    """Returns when the background write is done.

    Raises:
      ValueError: The write failed.
    """
    with self._storage_errors('save'):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the background write, and ends it; harmless a second time.

    Raises:
      ValueError: The write failed.
    """
    with self._storage_errors('save'):
      self._manager.close()

  def _existing(self, step: int | None) -> int:
    steps = self.steps()
    if not steps:
      raise ValueError(f'There is no checkpoint in {self.directory}.')
    if step is None:
      return steps[-1]
    if step not in steps:
      raise ValueError(f'There is no checkpoint of step {step} in {self.directory}, only of {steps}.')
    return step

  def _entry(self, step: int) -> dict:
    with self._storage_errors(f'read step {step}'):
      entry = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
    if not isinstance(entry, dict) or not {'format', 'leaves', 'meta'} <= entry.keys():
      raise ValueError(f'Step {step} in {self.directory} is not a checkpoint of this program.')
    if entry['format'] != FORMAT:
      raise ValueError(f'Step {step} in {self.directory} has format {entry["format"]}; this version reads {FORMAT}.')
    return entry

  def _check_fit(self, step: int, stored: dict[str, tuple], leaves: dict) -> None:
    wanted = {path: (tuple(shape), dtype) for path, shape, dtype in _specs(leaves)}
    differing = [path for path in wanted | stored if wanted.get(path) != stored.get(path)]
    if differing:
      path = differing[0]
      more = f' (and {len(differing) - 1} more)' if len(differing) > 1 else ''
      raise ValueError(
        f'Checkpoint of another architecture, step {step} in {self.directory}: {path!r} is '
        f'{_describe(stored.get(path))} there, {_describe(wanted.get(path))} here{more}.'
      )

  @contextlib.contextmanager
  def _storage_errors(self, action: str) -> Iterator[None]:
    """Whatever Orbax or the disk has to say, in one line."""
    try:
      yield
    except Exception as error:
      raise ValueError(f'Cannot {action} in {self.directory}: {_reason(error)}') from error


def _flatten(tree: PyTree) -> tuple[dict, jax.tree_util.PyTreeDef]:
  """Leaves by path; NumPy scalars as arrays, anything else that is not an array refused."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  named = {}
  for keys, leaf in leaves:
    path = jax.tree_util.keystr(keys, simple=True, separator='/')
    if path in named:
      raise ValueError(f'Two leaves of the state have the path {path!r}.')
    named[path] = _array(path, leaf)
  if not any(leaf.size for leaf in named.values()):
    raise ValueError('The state has no arrays.')
  return named, structure


def _array(path: str, leaf):
  if isinstance(leaf, np.generic):
    leaf = np.asarray(leaf)  # Orbax saves a NumPy scalar and cannot read it back.
  if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
    raise ValueError(f'Leaf {path!r} of the state is of type {type(leaf).__name__}; it must be a JAX or NumPy array.')
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.dtype.kind in 'OSUMm':
    raise ValueError(f'Leaf {path!r} of the state has dtype {leaf.dtype}; only numbers and booleans are kept.')
  return leaf


def _specs(leaves: dict) -> list:
  return [[path, list(leaf.shape), leaf.dtype.name] for path, leaf in leaves.items()]


def _describe(spec: tuple | None) -> str:
  return f'{spec[1]}{list(spec[0])}' if spec else 'missing'


def _target(leaf):
  """What Orbax is to make of a leaf: a NumPy array, or a JAX array in a definite place."""
  if isinstance(leaf, np.ndarray):
    return leaf
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _empty(target):
  zeros = np.zeros(target.shape, target.dtype)
  if isinstance(target, np.ndarray):
    return zeros
  return jax.make_array_from_callback(target.shape, target.sharding, lambda index: zeros[index])


def _canonical(value: dict, name: str) -> str:
  try:
    return json.dumps(value, sort_keys=True, separators=(',', ':'))
  except (TypeError, ValueError) as error:
    raise ValueError(f'The {name} must be JSON values: {error}.') from error


def _alone() -> ocp.options.MultiprocessingOptions:
  """One of several processes that waits for no other."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(
      primary_host=process, active_processes={process}, barrier_sync_key_prefix=f'alone{process}')


def _check_directory(directory: str, read_only: bool) -> None:
  if read_only:
    if not os.path.isdir(directory):
      raise ValueError(f'There is no folder {directory}.')
    return
  with parallel.together():
    try:
      os.makedirs(directory, exist_ok=True)
      with tempfile.TemporaryFile(dir=directory):
        pass
    except OSError as error:
      raise ValueError(f'Cannot write to {directory}: {error.strerror}.') from error
  parallel.check_shared(directory)


def _reason(error: Exception) -> str:
  """First line of an error, less the internals that TensorStore appends in brackets."""
  line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
  line = re.split(r" \[\w+(\[\d+\])?='", line, maxsplit=1)[0]
  return line if len(line) <= 300 else f'{line[:80]} ... {line[-200:]}'  # What the system says comes last.


def _silence_orbax() -> None:
  """Drops Orbax's log, of which all that matters is raised too, and late echoes of a read that has failed."""
  logger, report = logging.getLogger('absl'), sys.unraisablehook
  if _not_orbax in logger.filters:
    return
  logger.addFilter(_not_orbax)

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':  # Orbax closes it while TensorStore still calls back.
      report(unraisable)

  sys.unraisablehook = hook


def _not_orbax(record: logging.LogRecord) -> bool:
  return f'{os.sep}orbax{os.sep}' not in record.pathname
