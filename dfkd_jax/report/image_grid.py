"""Writes a picture of images with their labels."""

import colorsys
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
               scale: int | None = None, classes: Sequence[str] = ()) -> None:
  """Writes a PNG of images in rows, with labels underneath, on the first process only.

  Raises ValueError if an argument is wrong, or if the file cannot be written.

  Args:
    path: File, replaced atomically.
    images: [N, H, W, C] float in [0, 1] (clipped) or uint8, with C of 1 or 3.
    labels: N texts, such as the teacher's classes. Labels wider than an image are shortened.
    scale: Size of a pixel in the picture; None makes images of about 96 pixels.
    classes: Names of the colours of `color_masks`, for a legend at the end.
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
    tiles = np.broadcast_to(_to_uint8(images), (count, height, width, 3))
    tiles = tiles.repeat(scale, 1).repeat(scale, 2)
    sheet = _draw_sheet(tiles, labels, min(columns, count), classes)
    with reporting_disk_errors(path), replace_file(path) as file:
      sheet.save(file, format='PNG', optimize=True)


def mask_grid(path: str | os.PathLike, images: np.ndarray, masks: dict[str, np.ndarray],
              columns: int, classes: Sequence[str], ignore: int = -1) -> None:
  """Writes a PNG of images, and of their masks by title under each of them; see `image_grid`.

  Args:
    images: [N, H, W, C] float in [0, 1] (clipped) or uint8, with C of 1 or 3.
    masks: Integers [N, H, W] in 0..255, by title. Pixels of the class `ignore` are black.
    classes: Names of the classes, for the legend.
  """
  images = np.broadcast_to(_to_uint8(images), (*images.shape[:3], 3))
  pictures = {'image': images} | {
      title: np.where((mask == ignore)[..., None], 0, color_masks(mask)).astype(np.uint8)
      for title, mask in masks.items()}
  tiles, titles = [], []
  for start in range(0, len(images), columns):
    for title, of_title in pictures.items():
      row = of_title[start:start + columns]
      blank = np.full((columns - len(row), *row.shape[1:]), 255, np.uint8)
      tiles += [row, blank]
      titles += [title] * len(row) + [''] * len(blank)
  image_grid(path, np.concatenate(tiles), titles, columns, classes=classes)


def _to_uint8(images: np.ndarray) -> np.ndarray:
  if images.dtype == np.uint8:
    return images
  return np.rint(255 * np.clip(np.nan_to_num(images.astype(np.float32)), 0, 1)).astype(np.uint8)


def color_masks(masks: np.ndarray) -> np.ndarray:
  """Draws masks, integers [N, H, W] in 0..255, in a colour for each class: uint8 [N, H, W, 3]."""
  return _colors(256)[masks]


def _colors(number: int) -> np.ndarray:
  """Returns distinct colours, uint8 [number, 3]; the first ones differ most."""
  golden = (5**0.5 - 1) / 2  # hues that stay far from each other, however many there are
  colors = [colorsys.hsv_to_rgb(i * golden % 1, 0.75 - 0.25 * (i % 2), 0.95 - 0.35 * (i % 3 == 2))
            for i in range(number)]
  return np.rint(255 * np.array(colors)).astype(np.uint8)


def _draw_sheet(tiles: np.ndarray, labels: Sequence[str], columns: int,
                classes: Sequence[str]) -> Image.Image:
  count, height, width, _ = tiles.shape
  for size in range(15, 9, -1):  # The largest font in which all labels fit, or the smallest.
    font = ImageFont.load_default(size)
    if all(font.getlength(label) <= width for label in labels):
      break
  step_x, step_y = width + MARGIN, height + sum(font.getmetrics()) + MARGIN
  rows, line = -(-count // columns), sum(font.getmetrics()) + MARGIN // 2
  sheet_width = MARGIN + columns * step_x
  places = _place_legend(classes, font, sheet_width, line)
  top = MARGIN + rows * step_y
  sheet = Image.new('RGB', (sheet_width, top + (places[-1][1] + line if places else 0)), PAPER)
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
  for name, color, (x, y) in zip(classes, _colors(len(classes)), places, strict=True):
    draw.rectangle((x, top + y, x + line // 2, top + y + line // 2), fill=tuple(color.tolist()))
    draw.text((x + line, top + y - 3), name, fill=INK, font=font)
  return sheet


def _place_legend(classes, font, width, line):
  """Returns the place (x, y) of each class, in lines of a width."""
  places, x, y = [], MARGIN, 0
  for name in classes:
    step = 2 * line + round(font.getlength(name))
    if x + step > width and x > MARGIN:
      x, y = MARGIN, y + line
    places.append((x, y))
    x += step
  return places
