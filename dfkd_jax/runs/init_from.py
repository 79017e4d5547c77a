"""What a new run takes over from an old one: its student, its generator; all else begins anew."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dfkd_jax import parallel, paths, weights
from dfkd_jax.config import build
from dfkd_jax.config.records import Settings
from dfkd_jax.models.network import Network
from dfkd_jax.synth import generator_training
from dfkd_jax.synth import inversion as inversions
from dfkd_jax.types import PyTree

_STATES = (inversions.State, generator_training.State)
_FIELDS = ('meta_params', 'params', 'batch_stats')  # Of a generator in either.


def already_loaded(settings: Settings, there: Mapping[str, Any]) -> set[str]:
  """Of 'student' and 'generator' those that a run which goes on has taken over long since, and needs no more.

  A control begins as the student did, which then is needed again.

  Args:
    settings: Of the run.
    there: What is known of the run in the folder, see `run_folder.stored`.
  """
  before = there.get('config', {}).get('init_from')
  before = before if isinstance(before, dict) else {}
  return {which for which, source in settings.init_from._asdict().items()
          if source is not None and before.get(which) == source and f'init_from.{which}' in there.get('weights', {})
          and not (which == 'student' and settings.control)}


def digests(settings: Settings, there: Mapping[str, Any]) -> dict[str, str]:
  """SHA-256 of what is taken over, by its name in the config; of a run's folder, of these arrays alone.

  Arguments are those of `has`, and what that gives is not looked at: it may be gone, or another by now.

  Raises:
    ValueError: It cannot be read.
  """
  known = already_loaded(settings, there)
  return {name: there['weights'][name] if which in known else _digest(settings, which)
          for which, source in sorted(settings.init_from._asdict().items()) if source is not None
          for name in [f'init_from.{which}']}


def _digest(settings: Settings, which: str) -> str:
  source, path = getattr(settings.init_from, which), source_path(settings, which)
  try:
    if _checkpoint(source) is None:
      return weights.digest(path)
    arrays = _generator_of(path) if which == 'generator' else weights.read(path)
  except (OSError, ValueError) as error:
    raise ValueError(f'init_from.{which} is {source!r}: {error}') from None
  return weights.digest_of(dict(sorted(arrays.items())))


def _generator_of(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of the generator in a checkpoint, and no others: the images beside them may be many."""
  return weights.read_under(path, 'synthesis', _name)


def source_path(settings: Settings, which: str) -> pathlib.Path | None:
  """Where the 'student' or the 'generator' is taken from; None: it is not.

  Raises:
    ValueError: There is no such place, or it has no generator.
  """
  source = getattr(settings.init_from, which)
  if source is None:
    return None
  found = _checkpoint(source)
  if found is None and which == 'generator':
    raise ValueError(f'init_from.generator is {source!r}, must be the folder of a run with a checkpoint.')
  return found or build.weights_path(source, f'init_from.{which}')


def student(settings: Settings, network: Network, there: Mapping[str, Any], which: str = 'student') -> Network:
  """A network that is to be trained, with the variables of `init_from.student`, if that is set and needed (`has`).

  Raises:
    ValueError: There are none, or they do not fit.
  """
  source = settings.init_from.student
  if source is None or 'student' in already_loaded(settings, there):
    return network
  path, shape = source_path(settings, 'student'), getattr(settings, which).input_shape
  try:
    found = weights.load(path, network.module, shape)
  except (OSError, ValueError) as error:
    raise ValueError(f'init_from.student is {source!r}: {error}') from None
  return network.replace(params=found['params'], batch_stats=found.get('batch_stats', network.batch_stats))


def generator(settings: Settings, mesh: Mesh, synthesis: PyTree, there: Mapping[str, Any]) -> PyTree:
  """A method's state with the generator of `init_from.generator`, if that is set and needed (`has`).

  Raises:
    ValueError: It is no run's folder, its run or this one has no generator, or they differ in shape.
  """
  source = settings.init_from.generator
  if source is None or 'generator' in already_loaded(settings, there):
    return synthesis
  if not any(_is_generator(node) for node in jax.tree.leaves(synthesis, is_leaf=_is_generator)):
    raise ValueError(f'init_from.generator is {source!r}, must be None: this method has no generator that lasts.')
  try:
    arrays = _generator_of(source_path(settings, 'generator'))
  except ValueError as error:
    raise ValueError(f'init_from.generator is {source!r}, whose run has no generator that lasts: {error}') from None
  found = {_name(path): array for path, array in arrays.items()}

  def taken(node):
    if not _is_generator(node):
      return node
    fields = {name: getattr(node, name) for name in _FIELDS if hasattr(node, name)}
    return node.replace(**parallel.place(mesh, {name: _filled(source, name, of, found) for name, of in fields.items()}))

  return jax.tree.map(taken, synthesis, is_leaf=_is_generator)


def _filled(source: str, field: str, tree: PyTree, there: Mapping[str, np.ndarray]) -> PyTree:
  """A generator's parameters, or running moments, from those that are there; moments may be lacking."""

  def leaf(path, own):
    kind = 'batch_stats' if field == 'batch_stats' else 'params'
    name = f'{kind}/{jax.tree_util.keystr(path, simple=True, separator="/")}'
    if name not in there and kind == 'batch_stats':
      return np.asarray(own)
    found = there.get(name)
    if found is None or found.shape != own.shape:
      has = 'none' if found is None else f'{found.shape}'
      raise ValueError(f'init_from.generator is {source!r}, whose {name!r} is {has}, must be {own.shape}.')
    return jnp.asarray(found, own.dtype)

  return jax.tree_util.tree_map_with_path(leaf, tree)


def _name(path: str) -> str | None:
  """'inversion/meta_params/linear/kernel' -> 'params/linear/kernel'; None of what is no generator."""
  parts = path.split('/')
  depth = next((depth for depth, part in enumerate(parts[:2]) if part in _FIELDS), None)
  if depth is None:
    return None
  return '/'.join(['batch_stats' if parts[depth] == 'batch_stats' else 'params', *parts[depth + 1:]])


def _is_generator(node: PyTree) -> bool:
  return isinstance(node, _STATES)


def _checkpoint(source: str) -> pathlib.Path | None:
  """The latest checkpoint in the folder of a run; None if it is none."""
  folder = paths.expanded(source, 'init_from') / 'checkpoints'
  return weights.found_in(folder) if folder.is_dir() else None
