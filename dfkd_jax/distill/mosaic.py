"""Mosaics: several small images side by side, which a network of pixels takes as one.

Synthesised images are smaller than real ones, so that pixels see less around them, and a larger
share of them is at a border. Networks that see mosaics learn with more around each pixel, from the
same number of pixels. The cut through four images is from object detection
(Bochkovskiy et al., YOLOv4, arXiv:2004.10934, section 3.3); that the teacher labels the mosaic is
ours.
"""

from dfkd_jax.types import Array


def join(images: Array, side: int) -> Array:
  """Joins every side^2 images: [B, H, W, C] to [B / side^2, side * H, side * W, C]."""
  _, height, width, channels = images.shape
  rows = images.reshape(-1, side, side, height, width, channels).swapaxes(2, 3)
  return rows.reshape(-1, side * height, side * width, channels)


def split(maps: Array, side: int) -> Array:
  """Undoes `join`: [B, side * H, side * W, C] to [side^2 * B, H, W, C]."""
  _, height, width, channels = maps.shape
  parts = maps.reshape(-1, side, height // side, side, width // side, channels).swapaxes(2, 3)
  return parts.reshape(-1, height // side, width // side, channels)
