"""Devices and collectives: the only file that knows either."""

from jax import lax

from dfkd_jax.types import PyTree


def pmean(tree: PyTree, axis: str | None) -> PyTree:
  """Mean over the devices of a mapped axis; the tree itself where `axis` is None."""
  return tree if axis is None else lax.pmean(tree, axis)
