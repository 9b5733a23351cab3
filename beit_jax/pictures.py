"""Contact sheets with Pillow. Images in are float [B, H, W, 3] in [0, 1], pictures out uint8 [H, W, 3]."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 96  # pixels; images are scaled to about this
HIDDEN = 0.5  # grey of a masked patch


def hide(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Greys out the masked patches. mask: bool [B, h, w], True = masked."""
  image, mask = np.asarray(image), np.asarray(mask)
  ph, pw = image.shape[1] // mask.shape[1], image.shape[2] // mask.shape[2]
  return np.where(mask.repeat(ph, 1).repeat(pw, 2)[..., None], HIDDEN, image)


def palette(count: int) -> np.ndarray:
  """Colours far apart, uint8 [count, 3]: hues by the golden angle, brightness in three steps."""
  hue = (np.arange(count) * 0.618034) % 1
  hsv = np.stack([hue * 255, np.full(count, 200), 255 - np.arange(count) % 3 * 60], -1).astype(np.uint8)
  return np.asarray(Image.fromarray(hsv[None], "HSV").convert("RGB"))[0]


def overlay(image: np.ndarray, classes: np.ndarray, strength: float = 0.6) -> np.ndarray:
  """Colours of the classes laid over images [B, H, W, 3]; classes uint8 [B, H, W], 255 = none."""
  colours = palette(256)[classes] / 255.0
  mixed = (1 - strength) * image + strength * colours
  return np.where((classes == 255)[..., None], image * 0.4, mixed)


def _cell(image: np.ndarray) -> Image.Image:
  picture = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
  width = max(round(CELL * image.shape[1] / image.shape[0]), 1)
  enlarging = width >= picture.width
  return picture.resize((width, CELL), Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS)


def table(rows: dict[str, np.ndarray], columns: int = 8) -> np.ndarray:
  """One row of pictures per entry, its name above it."""
  title, gap = 16, 4
  cells = {name: [_cell(image) for image in images[:columns]] for name, images in rows.items()}
  width = max(sum(c.width + gap for c in row) for row in cells.values()) + gap
  sheet = Image.new("RGB", (width, len(cells) * (CELL + title + gap) + gap), "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
  y = gap
  for name, row in cells.items():
    draw.text((gap, y), name, fill="black", font=font)
    x = gap
    for cell in row:
      sheet.paste(cell, (x, y + title))
      x += cell.width + gap
    y += CELL + title + gap
  return np.asarray(sheet)


def captioned(images: np.ndarray, captions: list[str], columns: int = 8) -> np.ndarray:
  """A grid of images with a line of text under each."""
  title, gap = 16, 4
  cells = [_cell(image) for image in images[: 2 * columns]]
  width = max(c.width for c in cells) + gap
  rows = -(-len(cells) // columns)
  sheet = Image.new("RGB", (columns * width + gap, rows * (CELL + title + gap) + gap), "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
  for i, (cell, caption) in enumerate(zip(cells, captions, strict=False)):
    x, y = gap + i % columns * width, gap + i // columns * (CELL + title + gap)
    sheet.paste(cell, (x, y))
    draw.text((x, y + CELL + 1), caption[:18], fill="black" if "(is" not in caption else "red", font=font)
  return np.asarray(sheet)
