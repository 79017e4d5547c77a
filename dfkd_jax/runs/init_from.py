"""Weights that a new run takes over from an old one: its student, its generator."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dfkd_jax import parallel, paths, weights
from dfkd_jax.config import build
from dfkd_jax.config.records import InitFrom, NetworkSettings
from dfkd_jax.models.network import Network
from dfkd_jax.runs.folder import CHECKPOINTS
from dfkd_jax.synth import Synthesizer
from dfkd_jax.types import PRNGKey, PyTree

# Where methods keep their generator in the part 'synthesis' of a checkpoint of format 1, and the
# collection of variables that lies there.
_GENERATOR_PATHS = {
    'meta_params': 'params',  # FastDFKD, SSD-KD, NAYER
    'inversion/meta_params': 'params',  # CMI
    'params': 'params', 'batch_stats': 'batch_stats',  # methods that train one generator
    'online/params': 'params', 'online/batch_stats': 'batch_stats'}  # CuDFKD


def unread_sources(sources: InitFrom, stored: Mapping[str, Any], with_control: bool) -> InitFrom:
  """Returns the sources that a run must read: all, or after a resume those not in its checkpoints.

  A run with a noise control needs the first student again.
  """
  before = stored.get('config', {}).get('init_from') or {}
  for name, source in sources._asdict().items():
    is_read = before.get(name) == source and f'init_from.{name}' in stored.get('weights', {})
    if is_read and not (name == 'student' and with_control):
      sources = sources._replace(**{name: None})
  return sources


def source_digests(
    sources: InitFrom, unread: InitFrom, stored: Mapping[str, Any]) -> dict[str, str]:
  """Returns the SHA-256 of the weights of every source, as {'init_from.student': ...}.

  Those that are not `unread` are in the `stored` record. Raises ValueError if one cannot be read.
  """
  return {f'init_from.{name}': stored['weights'][f'init_from.{name}']
          if getattr(unread, name) is None else _digest(name, source)
          for name, source in sources._asdict().items() if source is not None}


def _digest(name: str, source: str) -> str:
  path = source_path(name, source)
  try:
    if not path.is_relative_to(paths.expand_path(source, 'init_from') / CHECKPOINTS):
      return weights.digest_files(path)
    arrays = (weights.read_subtree(path, 'synthesis', _variable_name) if name == 'generator'
              else weights.read(path))
  except (OSError, ValueError) as error:
    raise ValueError(f'init_from.{name} is {source!r}: {error}') from None
  return weights.digest_arrays(dict(sorted(arrays.items())))


def source_path(name: str, source: str) -> pathlib.Path:
  """Returns the latest checkpoint of a run's folder, or a student's file; ValueError if none."""
  folder = paths.expand_path(source, 'init_from') / CHECKPOINTS
  checkpoint = weights.find_checkpoint(folder) if folder.is_dir() else None
  if checkpoint is None and name == 'generator':
    raise ValueError(
        f'init_from.generator is {source!r}, must be the folder of a run with a checkpoint.')
  return checkpoint or build.weights_path(source, f'init_from.{name}')


def load_student(settings: NetworkSettings, key: PRNGKey, source: str | None) -> Network:
  """Makes a network with random variables, or with the variables of a source.

  Raises ValueError if the source cannot be read, or does not fit the network.
  """
  network = build.fresh_network(settings, key)
  if source is None:
    return network
  path = source_path('student', source)
  try:
    variables = weights.load(path, network.module, settings.input_shape)
  except (OSError, ValueError) as error:
    raise ValueError(f'init_from.student is {source!r}: {error}') from None
  batch_stats = variables.get('batch_stats', network.batch_stats)
  return network.replace(params=variables['params'], batch_stats=batch_stats)


def load_generator(
    synthesizer: Synthesizer, state: PyTree, source: str | None, mesh: Mesh) -> PyTree:
  """Returns a method's state with the generator of a run, the source; unchanged if that is None.

  Raises ValueError if the run or this method has no generator that lasts, or shapes differ.
  """
  if source is None:
    return state
  text, variables = f'init_from.generator is {source!r}', synthesizer.generator(state)
  if variables is None:
    raise ValueError(f'{text}, must be None: this method has no generator that lasts.')
  path = source_path('generator', source)
  try:
    arrays = weights.read_subtree(path, 'synthesis', _variable_name)  # without images
  except ValueError as error:
    raise ValueError(f'{text}, a run without a generator that lasts: {error}') from None
  arrays = {_variable_name(path): array for path, array in arrays.items()}

  def load_leaf(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name not in arrays and name.startswith('batch_stats/'):
      return np.asarray(leaf)  # The old generator has no running moments.
    shape = arrays[name].shape if name in arrays else 'missing'
    if shape != leaf.shape:
      raise ValueError(f'{text}, whose {name!r} is {shape}, must be {leaf.shape}.')
    return jnp.asarray(arrays[name], leaf.dtype)

  variables = jax.tree_util.tree_map_with_path(load_leaf, variables)
  return synthesizer.with_generator(state, parallel.place(mesh, variables))


def _variable_name(path: str) -> str | None:
  """Maps 'inversion/meta_params/linear/kernel' to 'params/linear/kernel', other arrays to None."""
  for prefix, collection in _GENERATOR_PATHS.items():
    if path.startswith(f'{prefix}/'):
      return path.replace(prefix, collection, 1)
  return None
