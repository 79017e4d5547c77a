"""The card of a network: its weights, size and preprocessing, for a report."""

import os
from typing import Any, NamedTuple

import jax
import numpy as np

from dfkd_jax.models.network import Network
from dfkd_jax.weights.digest import digest_arrays, digest_files
from dfkd_jax.weights.reading import split_entry


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
    return [
        f'weights     {self.source} (SHA-256 {self.sha256[:16]})',
        f'network     {self.num_params:,} parameters in {self.dtype}, {classes} classes',
        f'batch norm  {self.batch_norms} layers with {self.channels:,} channels',
        f'images      {order}mean ({mean}), std ({std}){resized}']


def describe(
    network: Network, source: str | os.PathLike[str] | None,
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
