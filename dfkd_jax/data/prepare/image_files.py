"""Images as files hold them: JPEG or PNG, kept as they are wherever readers agree on what they show."""

import concurrent.futures
import io
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.pgm', '.tif', '.tiff', '.webp')
_READ_AT_ONCE = 64


class Files:
  """Images in files, which may differ in size: read, each once and in order, when they are written.

  To `write` they look like an array uint8 [N, None, None, 3].

  Args:
    paths: Of N files.
  """

  dtype, ndim = np.dtype(np.uint8), 4

  def __init__(self, paths: Sequence[str | os.PathLike]):
    self.paths = tuple(paths)
    self.shape = (len(self.paths), None, None, 3)

  def __len__(self) -> int:
    return len(self.paths)

  def __iter__(self) -> Iterator[bytes]:
    """What to store of each file.

    Raises:
      ValueError: A file cannot be read; names it.
    """
    paths = iter(self.paths)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      while part := list(itertools.islice(paths, _READ_AT_ONCE)):  # Since map takes all that it is given at once.
        yield from pool.map(stored, part)


def stored(path: str | os.PathLike) -> bytes:
  """What is stored of a file: its bytes if they are a grey or RGB JPEG or PNG, else a PNG of it in RGB.

  TFDS reads both of the former without TensorFlow as RGB. Of other kinds it would
  show palette indices, or cyan for red; JPEGs in CMYK are an example from ImageNet.

  Raises:
    ValueError: It is no image, is cut off, or has more than 8 bits.
  """
  from PIL import Image

  try:
    raw = pathlib.Path(path).read_bytes()
    with Image.open(io.BytesIO(raw)) as image:
      if image.mode[0] in 'IF':
        raise ValueError(f'its mode {image.mode} has more than 8 bits')
      transparent = 'transparency' in image.info
      if _format(raw) and image.mode in ('L', 'RGB') and not transparent:
        image.draft(image.mode, (1, 1))  # An eighth of a JPEG's pixels show as well whether it is whole.
        image.load()
        return raw
      return png(np.asarray(image.convert('RGBA' if transparent else 'RGB').convert('RGB')))
  except Exception as error:  # PIL has errors of many kinds.
    reason = re.sub(r' <_io\.BytesIO.*?>', '', ' '.join(str(error).split()))  # An address says nothing.
    raise ValueError(f'Image {os.fspath(path)!r} cannot be read: {reason}') from error


def png(image: np.ndarray) -> bytes:
  """One image uint8 [H, W, C] as PNG."""
  from PIL import Image

  stream = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, 'png', compress_level=9)
  return stream.getvalue()


def is_jpeg(raw: bytes) -> bool:
  """Whether these bytes begin a JPEG."""
  return raw[:3] == b'\xff\xd8\xff'


def _format(raw: bytes) -> bool:
  return is_jpeg(raw) or raw[:8] == b'\x89PNG\r\n\x1a\n'
