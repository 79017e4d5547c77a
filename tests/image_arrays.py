"""Files of images and masks, and how bad ones must be refused."""

import io

import numpy as np
import pytest
from PIL import Image


def idx(path, array):
  """Writes an IDX file of unsigned bytes."""
  sizes = b''.join(size.to_bytes(4, 'big') for size in array.shape)
  path.write_bytes(b'\0\0\x08' + bytes([array.ndim]) + sizes + array.tobytes())


def image_pairs(size, height, width, highest=10, seed=0):
  """Returns images uint8 [N, H, W, 3] and masks uint8 [N, H, W] in 0..highest."""
  rng = np.random.default_rng(seed)
  return (rng.integers(0, 256, (size, height, width, 3), np.uint8),
          rng.integers(0, highest + 1, (size, height, width), np.uint8))


def fails_in_one_line(match):
  """Expects a ValueError of one line."""
  return pytest.raises(ValueError, match=rf'\A(?!.*\n).*{match}')


def png(array, mode=None):
  """Encodes an array as PNG, in mode 'P' or '1' if asked for."""
  stream = io.BytesIO()
  image = Image.fromarray(array)
  if mode == 'P':  # A palette of one's own: the indices stay, the colours are noise.
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
  elif mode == '1':
    image = Image.fromarray(array * np.uint8(255)).convert('1')
  image.save(stream, 'png')
  return stream.getvalue()


def save(path, array):
  """Writes an image and its folder; returns the path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path)
  return path
