"""Encoded images: files of photos, and arrays as PNG."""

import io
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dfkd_jax.data.errors import reporting_read_errors
from dfkd_jax.data.images import map_in_threads

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.pgm', '.tif', '.tiff', '.webp')
_JPEG, _PNG = b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n'


class Files:
  """Images in files, which may differ in size. `write` reads each file once, in order.

  Has the attributes of an array uint8 [N, None, None, 3].

  Args:
    paths: N paths.
  """

  dtype, ndim = np.dtype(np.uint8), 4

  def __init__(self, paths: Sequence[str | os.PathLike]):
    self.paths = tuple(paths)
    self.shape = (len(self.paths), None, None, 3)

  def __len__(self) -> int:
    return len(self.paths)

  def __iter__(self) -> Iterator[bytes]:
    """Encodes each file, see `encode_file`."""
    return map_in_threads(encode_file, self.paths)


def encode_file(path: str | os.PathLike) -> bytes:
  """Returns the bytes to store for an image file.

  These are the bytes of the file if it is a grey or RGB JPEG or PNG, which TFDS reads as RGB
  without TensorFlow. Other images are converted to an RGB PNG. Otherwise, TFDS would return
  palette indices, or wrong colours for the CMYK JPEGs of ImageNet.

  Raises:
    ValueError: The file is not an image, is cut off, or has more than 8 bits.
  """
  with reporting_read_errors(f'Image {os.fspath(path)!r}'):
    raw = pathlib.Path(path).read_bytes()
    with Image.open(io.BytesIO(raw)) as image:
      if image.mode[0] in 'IF':
        raise ValueError(f'its mode {image.mode} has more than 8 bits')
      transparent = 'transparency' in image.info
      if raw.startswith((_JPEG, _PNG)) and image.mode in ('L', 'RGB') and not transparent:
        image.draft(image.mode, (1, 1))  # Decoding at 1/8 size also detects a file that is cut off.
        image.load()
        return raw
      image = image.convert('RGBA' if transparent else 'RGB').convert('RGB')
      return encode_png(np.asarray(image))


def encode_png(image: np.ndarray) -> bytes:
  """Encodes an image uint8 [H, W, C]."""
  stream = io.BytesIO()
  image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  image.save(stream, 'png', compress_level=9)
  return stream.getvalue()


def is_jpeg(raw: bytes) -> bool:
  """Whether bytes begin with the signature of JPEG."""
  return raw.startswith(_JPEG)
