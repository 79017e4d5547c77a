"""Folders of Orbax: variables of a Flax model, a training state, or a run of this program."""

import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from dfkd_jax.messages import RefusedError, explain_read_errors, safe_names

_ITEMS = ('default', 'state', 'params', 'items', 'model')  # Names of a tree in a step's folder.
# Where variables lie in a tree: in the checkpoints of this program, and in common ones.
_PREFIXES = (
    'params/', '', 'student/network/', 'network/', 'state/', 'train_state/', 'variables/', 'model/')
_join = functools.partial(jax.tree_util.keystr, simple=True, separator='/')


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

  `entry` says where the params are ('ema', 'student.network'); None for the usual places.
  """

  def name_variables(paths):
    for prefix in _PREFIXES if entry is None else (f'{entry.replace(".", "/")}/',):
      if any(path.startswith(f'{prefix}params/') for path in paths):
        collections = f'{prefix}params/', f'{prefix}batch_stats/'
        return {path: path.removeprefix(prefix).replace('/', '.') for path in paths
                if path.startswith(collections)}
    where = f'in {entry!r} ' if entry else ''
    tops = safe_names({'/'.join(path.split('/')[:2]) for path in paths})
    raise RefusedError(f'holds no params {where}among {tops}')

  return _read(tree, name_variables)


def read_subtree(tree: pathlib.Path, prefix: str,
                 is_wanted: Callable[[str], Any] = lambda path: True) -> dict[str, np.ndarray]:
  """Reads the arrays below `prefix` ('': all) that are wanted, by the rest of their paths.

  Raises ValueError if there are none, or the tree is damaged.
  """
  start = prefix and f'{prefix}/'
  with explain_read_errors(tree):
    arrays = _read(tree, lambda paths: {
        path: rest for path in paths if path.startswith(start)
        and is_wanted(rest := path.removeprefix(start))})
  if not arrays:
    raise ValueError(f'{tree} holds nothing under {prefix!r}.')
  return arrays


def _read(
    tree: pathlib.Path, choose: Callable[[Iterable[str]], dict[str, str]]) -> dict[str, np.ndarray]:
  """Reads some leaves. `choose` maps the paths of all leaves to names for those to read."""
  import orbax.checkpoint as ocp  # Slow to import: only this format needs it.

  def flatten(tree):
    return {_join(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

  def is_foreign(record):
    return f'{os.sep}orbax{os.sep}' not in record.pathname

  logger = logging.getLogger('absl')
  logger.addFilter(is_foreign)  # Orbax raises the errors that it logs.
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      item = checkpointer.metadata(tree.resolve()).item_metadata.tree
      names = choose(flatten(item))
      item = jax.tree_util.tree_map_with_path(
          lambda path, leaf: leaf if _join(path) in names else ocp.PLACEHOLDER, item)
      as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
      restored = flatten(checkpointer.restore(
          tree.resolve(), args=ocp.args.PyTreeRestore(item=item, restore_args=as_arrays)))
  finally:
    logger.removeFilter(is_foreign)
  return {name: np.asarray(restored[path]) for path, name in names.items()}
