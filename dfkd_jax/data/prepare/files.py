"""Files of images and of masks, in place of arrays: only a batch of them is in memory at once."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dfkd_jax.data.images import map_in_threads, read_mask


class Files(tuple[str | os.PathLike, ...]):
  """Paths of N images of any size. Has the attributes of an array uint8 [N, None, None, 3]."""

  dtype, ndim = np.dtype(np.uint8), 4

  @property
  def shape(self) -> tuple[int, None, None, int]:
    """(N, None, None, 3)."""
    return len(self), None, None, 3


class MaskFiles(NamedTuple):
  """Masks of N images of any size. Has the attributes of an array uint8 [N, None, None].

  The files have one channel with a value for each pixel: 8 bits or less, or indices of a palette.
  """

  paths: tuple[str | os.PathLike, ...]
  first_label: int = 0  # The value v is class v - first_label; below 0 it is unlabelled, 255.

  dtype = property(lambda self: np.dtype(np.uint8))
  ndim = property(lambda self: 3)
  shape = property(lambda self: (len(self.paths), None, None))


def read_masks(masks: np.ndarray | MaskFiles) -> Iterator[np.ndarray]:
  """Yields each mask, uint8 [H, W], of an array in 0..255 or of files."""
  if not isinstance(masks, MaskFiles):
    return iter(masks.astype(np.uint8))
  return map_in_threads(lambda path: read_mask(path, masks.first_label), masks.paths)
