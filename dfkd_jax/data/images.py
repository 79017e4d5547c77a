"""Decoding, resizing and cropping of images."""

import concurrent.futures
import io
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

DECODED_AT_ONCE = 256
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # Of PIL, by channels.


def decode_all(
    name: str, size: int, records: Iterator[dict[str, Any]], image_shape: tuple[int, int, int] | None,
    decode: Callable[[bytes], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
  """All images and labels."""
  shape = None if image_shape is None else tuple(image_shape)
  images, labels = None, np.empty(size, np.int32)
  decode_record = lambda row, record: attempt(lambda: decode(record['image']), f'Image {row} of data set {name!r}')
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, size, DECODED_AT_ONCE):  # Since the pool's map takes all that it is given at once.
      part = attempt(lambda: list(itertools.islice(records, DECODED_AT_ONCE)), f'Data set {name!r}')
      if len(part) < min(DECODED_AT_ONCE, size - start):
        raise ValueError(f'Data set {name!r} is cut off: it has {start + len(part)} images and should have {size}.')
      labels[start:start + len(part)] = attempt(
          lambda part=part: [int(record['label']) for record in part], f'Data set {name!r}')
      for row, image in enumerate(pool.map(decode_record, itertools.count(start), part), start):
        shape = shape or image.shape
        if image.shape != shape:
          wanted = 'asked for' if image_shape else 'what others of it have'
          raise ValueError(
              f'Data set {name!r} has an image of {image.dtype} {image.shape}, but uint8 {shape} is {wanted}.')
        if images is None:
          images = np.empty((size, *shape), np.uint8)
        images[row] = image
  return images, labels


def decode_image(
    raw: bytes, channels: int | None, image_shape: tuple[int, int, int] | None, crop: float | None
) -> np.ndarray:
  """One image [H, W, C] out of a JPEG or PNG file."""
  from PIL import Image

  with Image.open(io.BytesIO(raw)) as image:
    mode = MODES.get(channels, image.mode)
    if image.mode != mode and (mode != 'RGB' or image.mode[0] in 'IF'):
      raise ValueError(f'It is {image.mode}, which is not turned into {mode}.')
    if image.mode != mode:
      image = image.convert('RGBA' if 'transparency' in image.info else mode).convert(mode)
    if crop is not None:
      image = _resize_and_crop(image, image_shape[0], image_shape[1], crop)
    pixels = np.asarray(image)
  return pixels if pixels.ndim == 3 else pixels[..., None]


def _resize_and_crop(image: Any, height: int, width: int, crop: float) -> Any:
  """The middle of a PIL image, with the roundings of torchvision's Resize and CenterCrop."""
  from PIL import Image

  short = round(max(height, width) / crop)
  sides = tuple(int(short * side / min(image.size)) for side in image.size)
  image = image.resize(sides, Image.Resampling.BILINEAR)
  left, top = round((sides[0] - width) / 2), round((sides[1] - height) / 2)
  return image.crop((left, top, left + width, top + height))


def attempt(read: Callable[[], Any], what: str) -> Any:
  """What `read` returns; whatever error TFDS has, in one line."""
  try:
    return read()
  except Exception as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise ValueError(f'{what} cannot be read: {reason}') from error
