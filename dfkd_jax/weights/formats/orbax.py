"""A folder that Orbax wrote: a Flax model's variables, a training state, or a run of this program."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dfkd_jax.messages import RefusedError, first_line, safe_names

_COLLECTIONS = ('params', 'batch_stats')
_ITEMS = ('default', 'state', 'params', 'items', 'model')  # What a step's folder keeps its tree under.
# Under what variables lie: of a student in the checkpoints of a distillation, and of training; of others' habits.
_WITHIN = ('params/', '', 'student/network/', 'network/', 'state/', 'train_state/', 'variables/', 'model/')


def found_in(folder: pathlib.Path) -> pathlib.Path | None:
  """The tree within a folder: itself, the item of a step, or that of the latest step; None if there is none."""
  if (folder / '_METADATA').is_file():
    return folder
  if items := [folder / name for name in _ITEMS if (folder / name / '_METADATA').is_file()]:
    return items[0]
  steps = sorted((int(path.name), path) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
  return next((tree for _, path in reversed(steps) if (tree := found_in(path))), None)


def read(tree: pathlib.Path, entry: str | None = None) -> dict[str, np.ndarray]:
  """Parameters and moments of batch norms, called 'params.conv1.kernel' and so on, and nothing else of the tree.

  Args:
    tree: As `found_in` gives it.
    entry: What to look in for params, as 'ema' or 'student.network'; None where they usually are.

  Raises:
    RefusedError: If it holds no parameters there.
    Exception: Of any kind, if it is damaged.
  """
  return _read(tree, lambda leaves: _variables(leaves, entry))


def read_under(
    tree: pathlib.Path, place: str, wanted: Callable[[str], Any] = lambda path: True) -> dict[str, np.ndarray]:
  """The arrays of a tree whose path is `place` and more, by that more, if that is wanted; of all, if `place` is ''.

  Raises:
    ValueError: If there is none, or the tree is damaged.
  """

  def within(leaves):
    paths = {'/'.join(path): path for path in leaves}  # A run's leaves have '/' in one key.
    before = place and f'{place}/'
    return {key: path.removeprefix(before) for path, key in paths.items()
            if path.startswith(before) and wanted(path.removeprefix(before))}

  try:
    found = _read(tree, within)
  except Exception as error:
    raise ValueError(f'Could not read {tree}: it is damaged ({first_line(error)}).') from error
  if not found:
    raise ValueError(f'{tree} holds nothing under {place!r}.')
  return found


def _read(
    tree: pathlib.Path, choose: Callable[[dict[tuple[str, ...], Any]], dict[tuple[str, ...], str]]
) -> dict[str, np.ndarray]:
  """The arrays that are chosen of a tree's leaves, by the names that are chosen for them."""
  import orbax.checkpoint as ocp  # Slow to import, and no other format needs it.

  with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    item = checkpointer.metadata(tree.resolve()).item_metadata.tree
    wanted = choose(traverse_util.flatten_dict(_plain(item)))
    kept = {id(leaf) for path, leaf in traverse_util.flatten_dict(_plain(item)).items() if path in wanted}
    item = jax.tree.map(lambda leaf: leaf if id(leaf) in kept else ocp.PLACEHOLDER, item)
    arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    restored = checkpointer.restore(tree.resolve(), args=ocp.args.PyTreeRestore(item=item, restore_args=arrays))
  restored = traverse_util.flatten_dict(_plain(restored))
  return {name: np.asarray(restored[path]) for path, name in wanted.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without what Orbax logs: all that matters is raised too."""
  logger, keep = logging.getLogger('absl'), lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


def _plain(tree: Any) -> Any:
  """Dicts for lists too; branches without leaves are dropped by `flatten_dict`."""
  if isinstance(tree, (list, tuple)):
    tree = {str(index): leaf for index, leaf in enumerate(tree)}
  return {str(key): _plain(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _variables(leaves: Mapping[tuple[str, ...], Any], entry: str | None) -> dict[tuple[str, ...], str]:
  """From the paths of leaves that are a model's variables to their names."""
  paths = {'/'.join(path): path for path in leaves}  # A run's leaves have '/' in one key.
  places = _WITHIN if entry is None else (f'{entry.replace(".", "/")}/',)
  within = next((place for place in places if any(path.startswith(f'{place}params/') for path in paths)), None)
  if within is None:
    where = f'in {entry!r} ' if entry else ''
    raise RefusedError(f'holds no params {where}among {safe_names({"/".join(path.split("/")[:2]) for path in paths})}')
  wanted = tuple(f'{within}{collection}/' for collection in _COLLECTIONS)
  return {key: path.removeprefix(within).replace('/', '.') for path, key in paths.items() if path.startswith(wanted)}
