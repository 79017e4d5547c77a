"""Decoding, resizing, cropping and encoding of images."""

import concurrent.futures
import io
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from dfkd_jax import messages

Shape = tuple[int, int, int]  # (H, W, C)
BATCH_SIZE = 64  # Images that threads work on at once. This bounds the memory.
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # PIL's modes, by number of channels.
JPEG, _PNG = b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n'  # The first bytes of files.


def map_in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
  """Maps a function over items in threads and in order, `BATCH_SIZE` items at a time."""
  items = iter(items)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    while batch := list(itertools.islice(items, BATCH_SIZE)):
      yield from pool.map(function, batch)


def decode_image(
    raw: bytes, channels: int | None, image_shape: Shape | None, crop: float | None) -> np.ndarray:
  """Decodes a JPEG or PNG file to uint8 [H, W, C]; see `load` for `image_shape` and `crop`."""
  with Image.open(io.BytesIO(raw)) as image:
    mode = MODES.get(channels, image.mode)
    if image.mode != mode and (mode != 'RGB' or image.mode[0] in 'IF'):
      raise ValueError(f'images of mode {image.mode} cannot be converted to {mode}')
    if image.mode != mode:
      image = image.convert('RGBA' if 'transparency' in image.info else mode).convert(mode)
    if crop is not None:  # Rounds as torchvision's Resize and CenterCrop do.
      height, width, _ = image_shape
      short = round(max(height, width) / crop)
      sides = tuple(int(short * side / min(image.size)) for side in image.size)
      left, top = round((sides[0] - width) / 2), round((sides[1] - height) / 2)
      image = image.resize(sides, Image.Resampling.BILINEAR)
      image = image.crop((left, top, left + width, top + height))
    return np.atleast_3d(np.asarray(image))


def encode_file(path: str | os.PathLike) -> bytes:
  """Returns the bytes to store for an image file.

  These are the bytes of the file if it is a grey or RGB JPEG or PNG, which TFDS reads as RGB
  without TensorFlow. Other images are converted to an RGB PNG. Otherwise, TFDS would return
  palette indices, or wrong colours for the CMYK JPEGs of ImageNet.

  Raises ValueError if the file is not an image, is cut off, or has more than 8 bits.
  """
  with messages.reporting_read_errors(f'Image {os.fspath(path)!r}'):
    raw = pathlib.Path(path).read_bytes()
    with Image.open(io.BytesIO(raw)) as image:
      if image.mode[0] in 'IF':
        raise ValueError(f'its mode {image.mode} has more than 8 bits')
      transparent = 'transparency' in image.info
      if raw.startswith((JPEG, _PNG)) and image.mode in ('L', 'RGB') and not transparent:
        image.draft(image.mode, (1, 1))  # Decoding at 1/8 size also detects a file that is cut off.
        image.load()
        return raw
      return encode_png(np.asarray(image.convert('RGBA' if transparent else 'RGB').convert('RGB')))


def encode_png(image: np.ndarray) -> bytes:
  """Encodes an image uint8 [H, W, C]."""
  stream = io.BytesIO()
  image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  image.save(stream, 'png', compress_level=9)
  return stream.getvalue()
