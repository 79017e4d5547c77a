"""Decoding, resizing and cropping of images."""

import concurrent.futures
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from dfkd_jax.data.errors import reporting_read_errors

Shape = tuple[int, int, int]  # (H, W, C)
BATCH_SIZE = 64  # Images that threads work on at once. This bounds the memory.
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # PIL's modes, by number of channels.


def decode_all(
    name: str, size: int, records: Iterable[dict[str, Any]], image_shape: Shape | None,
    decode: Callable[[bytes], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes N = `size` records in threads.

  Returns images uint8 [N, H, W, C] and labels int32 [N]. Raises ValueError if a record is damaged
  or missing, or if an image does not have `image_shape`, or the shape of the first image.
  """

  def read_records():
    with reporting_read_errors(f'Data set {name!r}'):
      for row, record in zip(range(size), records, strict=True):
        yield row, record['image'], int(record['label'])

  def decode_record(record):
    row, raw, label = record
    with reporting_read_errors(f'Image {row} of data set {name!r}'):
      return row, decode(raw), label

  images, labels = None, np.empty(size, np.int32)
  for row, image, label in map_in_threads(decode_record, read_records()):
    if images is None:
      images = np.empty((size, *(image_shape or image.shape)), np.uint8)
    if image.shape != images.shape[1:]:
      source = 'image_shape' if image_shape else 'the shape of the first image'
      raise ValueError(f'Data set {name!r} has an image {image.shape}, must be '
                       f'{images.shape[1:]}, {source}.')
    images[row], labels[row] = image, label
  return images, labels


def map_in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
  """Maps a function over items in threads and in order, `BATCH_SIZE` items at a time."""
  items = iter(items)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    while batch := list(itertools.islice(items, BATCH_SIZE)):
      yield from pool.map(function, batch)


def decode_image(
    raw: bytes, channels: int | None, image_shape: Shape | None, crop: float | None
) -> np.ndarray:
  """Decodes a JPEG or PNG file to uint8 [H, W, C]; see `load` for `image_shape` and `crop`."""
  with Image.open(io.BytesIO(raw)) as image:
    mode = MODES.get(channels, image.mode)
    if image.mode != mode and (mode != 'RGB' or image.mode[0] in 'IF'):
      raise ValueError(f'images of mode {image.mode} cannot be converted to {mode}')
    if image.mode != mode:
      image = image.convert('RGBA' if 'transparency' in image.info else mode).convert(mode)
    if crop is not None:
      image = _resize_and_crop(image, image_shape[0], image_shape[1], crop)
    pixels = np.asarray(image)
  return pixels if pixels.ndim == 3 else pixels[..., None]


def _resize_and_crop(image: Image.Image, height: int, width: int, crop: float) -> Image.Image:
  """Resizes and crops a PIL image, rounding as torchvision's Resize and CenterCrop do."""
  short = round(max(height, width) / crop)
  sides = tuple(int(short * side / min(image.size)) for side in image.size)
  image = image.resize(sides, Image.Resampling.BILINEAR)
  left, top = round((sides[0] - width) / 2), round((sides[1] - height) / 2)
  return image.crop((left, top, left + width, top + height))
