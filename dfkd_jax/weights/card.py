"""The card of a network, for a report: its weights and their SHA-256, size, preprocessing."""

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dfkd_jax.messages import explain_read_errors
from dfkd_jax.models.network import Network
from dfkd_jax.weights.formats import tfjs
from dfkd_jax.weights.reading import find_weights, split_entry


class Card(NamedTuple):
  """Facts about a network, as plain data: `_asdict()` is JSON."""

  source: str
  sha256: str  # Of the weights' files (`digest_files`), or of variables that are from no file.
  num_classes: int | None  # None if the module does not say.
  num_params: int
  batch_norms: int
  channels: int  # Of all batch norms together.
  dtype: str
  mean: tuple[float, ...]
  std: tuple[float, ...]
  bgr: bool
  resize: Any

  def lines(self) -> list[str]:
    """Lines of text for a reader."""
    mean, std = (', '.join(f'{x:.4g}' for x in numbers) for numbers in (self.mean, self.std))
    order, classes = 'BGR, ' if self.bgr else '', self.num_classes or 'unknown'
    resized = f', resized to {self.resize}' if self.resize else ''
    return [f'weights     {self.source} (SHA-256 {self.sha256[:16]})',
            f'network     {self.num_params:,} parameters in {self.dtype}, {classes} classes',
            f'batch norm  {self.batch_norms} layers with {self.channels:,} channels',
            f'images      {order}mean ({mean}), std ({std}){resized}']


def describe(network: Network, source: str | os.PathLike[str] | None,
             path: str | os.PathLike[str] | None = None) -> Card:
  """Makes the card of a network, with weights from a source, or from no file if that is None.

  `path` says where they lie if `source` is no path.
  """
  moments = network.running().values()
  if source is None:
    variables = {'params': network.params, 'batch_stats': network.batch_stats}
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    sha256 = digest_arrays({jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves})
  else:
    sha256 = digest_files(split_entry(source if path is None else path)[0])
  return Card(
      source='variables in memory' if source is None else os.fspath(source), sha256=sha256,
      num_classes=getattr(network.module, 'num_classes', None), num_params=network.num_params(),
      batch_norms=len(moments), channels=sum(int(norm.mean.size) for norm in moments),
      dtype=', '.join(sorted({leaf.dtype.name for leaf in jax.tree.leaves(network.params)})),
      mean=tuple(map(float, network.mean)), std=tuple(map(float, network.std)),
      bgr=network.bgr, resize=network.resize)


def digest_files(path: pathlib.Path) -> str:
  """SHA-256 of a file of weights, as from sha256sum, or of the weights in a folder.

  The digest of a folder covers the names and digests of its files of weights, in order: a
  model.json with its shards, one file of the hub, or all files of Orbax. A model.json has the
  digest of its folder.

  Raises OSError if there is no such file. Raises ValueError if a folder holds no weights, or a
  model.json is damaged or lacks a shard.
  """
  path.stat()  # Raises OSError if there is none.
  with explain_read_errors(path):
    weights = find_weights(path) if path.is_dir() else path
    if weights.is_dir():
      folder = path
      names = sorted(
          file.relative_to(path).as_posix() for file in path.rglob('*') if file.is_file())
    else:
      folder = weights.parent
      is_model = weights.suffix == '.json'
      shards = tfjs.list_shards(weights.read_bytes(), folder) if is_model else []
      names = sorted({weights.name, *shards})
  digests = []
  for name in names:
    with (folder / name).open('rb') as file:
      digests.append(hashlib.file_digest(file, 'sha256').hexdigest())
  if names == [path.name] and not path.is_dir():
    return digests[0]
  lines = (f'{digest}  {name}\n' for digest, name in zip(digests, names, strict=True))
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
  """SHA-256 of the names, dtypes, shapes and bytes of arrays, in their order."""
  digest = hashlib.sha256()
  for name, array in arrays.items():
    digest.update(f'{name} {array.dtype} {array.shape}'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()
