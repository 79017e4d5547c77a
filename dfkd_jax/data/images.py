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
UNLABELLED = 255  # In masks.
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # PIL's modes, by number of channels.
MASK_MODES = ('1', 'L', 'P')  # PIL's modes of one channel of 8 bits or less.
JPEG, _PNG = b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n'  # The first bytes of files.
_SPREAD = {'L;2': 85, 'L;4': 17}  # By the bits of a grey PNG, as Pillow names them.


def map_in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
  """Maps a function over items in threads and in order, `BATCH_SIZE` items at a time."""
  items = iter(items)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    while batch := list(itertools.islice(items, BATCH_SIZE)):
      yield from pool.map(function, batch)


def decode_image(raw: bytes, channels: int | None, image_shape: Shape | None, crop: float | None,
                 resize: bool = False) -> np.ndarray:
  """Decodes a JPEG or PNG file to uint8 [H, W, C]; see `load` for the other arguments."""
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
    if resize:
      image = image.resize(image_shape[1::-1], Image.Resampling.BILINEAR)
    return np.atleast_3d(np.asarray(image))


def decode_mask(raw: bytes, image: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
  """Decodes the mask of an image to class indices uint8 [H, W].

  `raw` and `image` are files. `size` is (height, width), to which the mask is resized.
  Raises ValueError if the mask has no class indices, or another size than the image.
  """
  with Image.open(io.BytesIO(image)) as pixels, Image.open(io.BytesIO(raw)) as mask:
    divisor = _check_mask(mask)
    if mask.size != pixels.size:
      raise ValueError(f'its size is {_in_words(mask)}, must be {_in_words(pixels)}, as its image')
    if size is not None:
      mask = mask.resize(size[::-1], Image.Resampling.NEAREST)
    return np.array(mask, np.uint8) // divisor


def read_mask(path: str | os.PathLike, first_label: int = 0) -> np.ndarray:
  """Reads a file of a mask: class indices uint8 [H, W], 255 where a pixel is unlabelled.

  A value v is class v - first_label. Values below `first_label`, and 255, are unlabelled.
  Raises ValueError if the file is not an image of class indices, or is cut off.
  """
  with messages.reporting_read_errors(f'Mask {os.fspath(path)!r}'), Image.open(path) as mask:
    divisor = _check_mask(mask)
    values = np.array(mask, np.uint8) // divisor
  is_known = (values >= first_label) & (values < UNLABELLED)
  return np.where(is_known, values - np.uint8(first_label), np.uint8(UNLABELLED))


def check_pair(image: str | os.PathLike, mask: str | os.PathLike) -> None:
  """Raises ValueError unless the file of a mask has class indices, and the size of its image."""
  with messages.reporting_read_errors(f'Image {os.fspath(image)!r}'), Image.open(image) as opened:
    size, needed = opened.size, _in_words(opened)
  with messages.reporting_read_errors(f'Mask {os.fspath(mask)!r}'), Image.open(mask) as opened:
    _check_mask(opened)
    if opened.size != size:
      raise ValueError(f'its size is {_in_words(opened)}, must be {needed}, as image '
                       f'{os.fspath(image)!r}')


def _check_mask(mask: Image.Image) -> np.uint8:
  """Returns the factor of class indices: Pillow spreads grey levels of 2 or 4 bits over 0..255."""
  if mask.mode not in MASK_MODES:
    raise ValueError(f'its mode is {mask.mode}, must be grey or palette with one class index a '
                     'pixel')
  if mask.format == 'JPEG':
    raise ValueError('it is a JPEG, which changes class indices; must be a PNG or the like')
  return np.uint8(_SPREAD.get(mask.tile[0][-1], 1) if mask.mode == 'L' and mask.tile else 1)


def _in_words(image: Image.Image) -> str:
  """Returns the size as 'height x width'."""
  return f'{image.height} x {image.width}'


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
