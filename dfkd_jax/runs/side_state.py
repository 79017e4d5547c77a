"""What a run keeps of that which it does after its rounds, for as long as it has not ended."""

import pathlib
import shutil
from collections.abc import Callable

from dfkd_jax import parallel, report
from dfkd_jax.runs import config_diff
from dfkd_jax.runs.checkpoint import Checkpoints, DamagedError
from dfkd_jax.runs.checkpoint_format import config_hash
from dfkd_jax.runs.state import RunState, fields_of, shapes_of
from dfkd_jax.types import PyTree


class SideState:
  """The keeping of what a run does after its rounds; a context manager.

  What is there of a run with another config or other weights is removed, and so is what cannot be read: it costs time,
  and nothing else.

  Args:
    store: Of the run, entered.
    folder: Made if missing.
  """

  def __init__(self, store: RunState, folder: pathlib.Path):
    self._store, self._folder = store, folder
    self._identity = [config_hash(config_diff.identity(store.meta['config'])), store.meta['weights']]
    self._checkpoints: Checkpoints | None = None

  def __enter__(self) -> 'SideState':
    self._open(lambda: self._folder.exists() and not self._is_own())
    return self

  def _open(self, is_foreign: Callable[[], bool]) -> None:
    with parallel.raise_on_all_processes():
      if parallel.is_first() and is_foreign():
        try:
          shutil.rmtree(self._folder)
        except OSError as error:
          raise ValueError(f'Cannot remove {self._folder}, which is no use to this run: '
                           f'{error.strerror or error}.') from error
    self._checkpoints = Checkpoints(self._folder, max_to_keep=1)

  def __exit__(self, *error) -> None:
    self._checkpoints.__exit__(*error)

  def _is_own(self) -> bool:
    with Checkpoints(self._folder, read_only=True) as found:
      try:
        return not found.any() or found.meta()['identity'] == self._identity
      except DamagedError:
        return False

  def begin(self, state: PyTree) -> tuple[PyTree, int]:
    """The state where it stopped, and how many of its steps are done; else the state given, and 0."""
    if not self._checkpoints.any():
      return state, 0
    try:
      with self._store.ledger.part('checkpoint'):
        tree, meta = self._checkpoints.restore(shapes_of(fields_of(state)))
    except DamagedError as error:
      report.note(f'{str(error).rstrip(".")}. It is begun anew.')
      self._checkpoints.close()
      self._open(lambda: True)
      return state, 0
    self._store.take_beside(meta['spent'])
    return state.replace(**tree), meta['done']

  def save(self, done: int, state: PyTree) -> None:
    """Begins to write the state after `done` steps."""
    with self._store.ledger.part('checkpoint'):
      self._checkpoints.save(
          done, fields_of(state), {'identity': self._identity, 'done': done, 'spent': self._store.spent()})

  def wait(self) -> None:
    """Returns when all that was saved is written."""
    with self._store.ledger.part('checkpoint'):
      self._checkpoints.wait()
