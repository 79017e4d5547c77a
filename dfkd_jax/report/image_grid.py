"""Writes a picture of images with their labels."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dfkd_jax import parallel
from dfkd_jax.report.files import replace_file, reporting_disk_errors

MARGIN = 10  # Pixels around every image.
INK, PAPER, FRAME = (48, 48, 48), (255, 255, 255), (200, 200, 200)


def image_grid(path: str | os.PathLike, images: Any, labels: Sequence[str], columns: int = 10,
               scale: int | None = None) -> None:
  """Writes a PNG of images in rows, with labels underneath, on the first process only.

  Raises ValueError if an argument is wrong, or if the file cannot be written.

  Args:
    path: File, replaced atomically.
    images: [N, H, W, C] float in [0, 1] (clipped) or uint8, with C of 1 or 3.
    labels: N texts, such as the teacher's classes. Labels wider than an image are shortened.
    scale: Size of a pixel in the picture; None makes images of about 96 pixels.
  """
  images = np.asarray(images)
  if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
    raise ValueError(f'Images have shape {images.shape}, must be non-empty [N, H, W, 1 or 3].')
  if images.dtype != np.uint8 and images.dtype.kind in 'biu':
    raise ValueError(f'Images are {images.dtype}, must be float in [0, 1] or uint8.')
  count, height, width, _ = images.shape
  if len(labels) != count:
    raise ValueError(f'There are {len(labels)} labels for {count} images.')
  scale = max(1, round(96 / max(height, width))) if scale is None else scale
  if parallel.is_first():
    if images.dtype != np.uint8:
      images = np.clip(np.nan_to_num(images.astype(np.float32)), 0, 1)
      images = np.rint(images * 255).astype(np.uint8)
    tiles = np.broadcast_to(images, (count, height, width, 3))
    sheet = _draw_sheet(tiles.repeat(scale, 1).repeat(scale, 2), labels, min(columns, count))
    with reporting_disk_errors(path), replace_file(path) as file:
      sheet.save(file, format='PNG', optimize=True)


def _draw_sheet(tiles: np.ndarray, labels: Sequence[str], columns: int) -> Image.Image:
  count, height, width, _ = tiles.shape
  for size in range(15, 9, -1):  # The largest font in which all labels fit, or the smallest.
    font = ImageFont.load_default(size)
    if all(font.getlength(label) <= width for label in labels):
      break
  step_x, step_y = width + MARGIN, height + sum(font.getmetrics()) + MARGIN
  rows = -(-count // columns)
  sheet = Image.new('RGB', (MARGIN + columns * step_x, MARGIN + rows * step_y), PAPER)
  draw = ImageDraw.Draw(sheet)
  for index, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
    x, y = MARGIN + index % columns * step_x, MARGIN + index // columns * step_y
    draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
    sheet.paste(Image.fromarray(tile), (x, y))
    end = len(label)
    while end and font.getlength(label) > width:
      end -= 1
      label = label[:end].rstrip() + '…'
    draw.text((x + width / 2, y + height + 3), label, fill=INK, font=font, anchor='ma')
  return sheet
