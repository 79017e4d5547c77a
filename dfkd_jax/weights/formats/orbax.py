"""Folders of Orbax: variables of a Flax model, a training state, or a run of this program."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dfkd_jax.messages import RefusedError, explain_read_errors, safe_names

_ITEMS = ('default', 'state', 'params', 'items', 'model')  # Names of a tree in a step's folder.
# Where variables lie in a tree: in the checkpoints of this program, and in common ones.
_PREFIXES = (
    'params/', '', 'student/network/', 'network/', 'state/', 'train_state/', 'variables/', 'model/')


def find_checkpoint(folder: pathlib.Path) -> pathlib.Path | None:
  """Finds the tree in a folder: itself, a step's item, or the latest step's; None if none."""
  for tree in (folder, *(folder / name for name in _ITEMS)):
    if (tree / '_METADATA').is_file():
      return tree
  steps = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
  steps.sort(key=lambda path: int(path.name), reverse=True)
  return next((tree for path in steps if (tree := find_checkpoint(path))), None)


def read(tree: pathlib.Path, entry: str | None = None) -> dict[str, np.ndarray]:
  """Reads parameters and moments of batch norms, named 'params.conv1.kernel' and so on.

  Args:
    tree: Folder from `find_checkpoint`.
    entry: Where the params are, such as 'ema' or 'student.network'; None for the usual places.
  """
  return _read(tree, lambda paths: _name_variables(paths, entry))


def read_subtree(
    tree: pathlib.Path, prefix: str, is_wanted: Callable[[str], Any] = lambda path: True
) -> dict[str, np.ndarray]:
  """Reads the arrays below `prefix`, by the rest of their paths; '' reads the whole tree.

  Args:
    tree: Folder from `find_checkpoint`.
    prefix: Path without a trailing '/'.
    is_wanted: Whether to read an array, by the rest of its path.

  Raises:
    ValueError: There are none, or the tree is damaged.
  """
  start = prefix and f'{prefix}/'
  with explain_read_errors(tree):
    arrays = _read(tree, lambda paths: {
        path: path.removeprefix(start) for path in paths
        if path.startswith(start) and is_wanted(path.removeprefix(start))})
  if not arrays:
    raise ValueError(f'{tree} holds nothing under {prefix!r}.')
  return arrays


def _read(
    tree: pathlib.Path, choose: Callable[[Iterable[str]], dict[str, str]]
) -> dict[str, np.ndarray]:
  """Reads some leaves. `choose` maps the paths of all leaves to names for those to read."""
  import orbax.checkpoint as ocp  # Slow to import: only this format needs it.

  with _without_logs(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    item = checkpointer.metadata(tree.resolve()).item_metadata.tree
    leaves = _flatten(item)
    names = choose(leaves)
    wanted = {id(leaves[path]) for path in names}
    item = jax.tree.map(lambda leaf: leaf if id(leaf) in wanted else ocp.PLACEHOLDER, item)
    as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    restored = _flatten(checkpointer.restore(
        tree.resolve(), args=ocp.args.PyTreeRestore(item=item, restore_args=as_arrays)))
  return {name: np.asarray(restored[path]) for path, name in names.items()}


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
  """Drops Orbax's log records: it raises all errors too."""
  logger = logging.getLogger('absl')
  is_foreign = lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname
  logger.addFilter(is_foreign)
  try:
    yield
  finally:
    logger.removeFilter(is_foreign)


def _flatten(tree: Any) -> dict[str, Any]:
  """Leaves by path, joined by '/'. Lists count as dicts with numbers for keys."""

  def to_dicts(node):
    if isinstance(node, (list, tuple)):
      node = dict(enumerate(node))
    if not isinstance(node, Mapping):
      return node
    return {str(key): to_dicts(child) for key, child in node.items()}

  return traverse_util.flatten_dict(to_dicts(tree), sep='/')


def _name_variables(paths: Iterable[str], entry: str | None) -> dict[str, str]:
  """Names a model's variables, by their paths."""
  prefixes = _PREFIXES if entry is None else (f'{entry.replace(".", "/")}/',)
  for prefix in prefixes:
    if any(path.startswith(f'{prefix}params/') for path in paths):
      collections = f'{prefix}params/', f'{prefix}batch_stats/'
      return {path: path.removeprefix(prefix).replace('/', '.') for path in paths
              if path.startswith(collections)}
  where = f'in {entry!r} ' if entry else ''
  tops = safe_names({'/'.join(path.split('/')[:2]) for path in paths})
  raise RefusedError(f'holds no params {where}among {tops}')
