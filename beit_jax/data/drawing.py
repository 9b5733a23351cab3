"""Contact sheets and class colours with Pillow. Images in: float [B, H, W, 3] in [0, 1]; pictures: uint8 [H, W, 3]."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 96  # pixels; images are scaled to about this
HIDDEN = 0.5  # grey of a masked patch
# Colours of a data set's classes, in the order of their numbers.
PALETTES: dict[str, tuple[tuple[int, int, int], ...]] = {
  "camvid": (
    (128, 128, 128),  # sky
    (128, 0, 0),  # building
    (192, 192, 128),  # pole
    (128, 64, 128),  # road
    (60, 40, 222),  # pavement
    (128, 128, 0),  # tree
    (192, 128, 128),  # sign
    (64, 64, 128),  # fence
    (64, 0, 128),  # car
    (64, 64, 0),  # pedestrian
    (0, 128, 192),  # bicyclist
  ),
}


def hide(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Greys out the masked patches. mask: bool [B, h, w], True = masked."""
  image, mask = np.asarray(image), np.asarray(mask)
  ph, pw = image.shape[1] // mask.shape[1], image.shape[2] // mask.shape[2]
  return np.where(mask.repeat(ph, 1).repeat(pw, 2)[..., None], HIDDEN, image)


@functools.cache
def palette(count: int) -> np.ndarray:
  """Colours far apart, uint8 [count, 3], neither near black nor near white nor grey; count <= 256.

  Each is the one of a grid that is farthest from all before it, as the eye sees it: the first n of more are the same n.
  """
  levels = np.linspace(0, 255, 9).round()
  grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
  places = _oklab(grid)
  lightness, chroma = places[:, 0], np.hypot(places[:, 1], places[:, 2])
  good = (lightness > 0.3) & (lightness < 0.93) & (chroma > 0.03)
  grid, places = grid[good], places[good]
  chosen, distance = (
    [],
    -np.linalg.norm(places - _oklab(np.array([220.0, 32, 32])), axis=1),
  )  # red comes first
  for i in range(count):
    chosen.append(distance.argmax())
    new = np.linalg.norm(places - places[chosen[-1]], axis=1)
    distance = np.minimum(distance, new) if i else new
  colours = grid[chosen].astype(np.uint8)
  colours.flags.writeable = False  # others get the same array
  return colours


def _oklab(rgb: np.ndarray) -> np.ndarray:
  """[..., 3] of 0..255 -> Ottosson's Oklab, where distances are those that people see; gamma 2.2 for sRGB's."""
  cones = (rgb / 255.0) ** 2.2 @ np.array(
    [[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]]
  )
  return np.cbrt(cones) @ np.array(
    [[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]]
  )


def class_colours(chosen: str | Sequence[Any], count: int) -> np.ndarray:
  """A colour for each of `count` classes, uint8 [count, 3].

  Args:
    chosen: a name in `PALETTES`, (red, green, blue) in 0..255 for every class, or nothing: `palette(count)`.

  Raises:
    ValueError: it is none of these; the message says what is wrong.
  """
  if isinstance(chosen, str) and chosen and chosen not in PALETTES:
    raise ValueError(f"{chosen!r} is unknown; there are {', '.join(map(repr, PALETTES))}")
  rows = PALETTES[chosen] if isinstance(chosen, str) and chosen else chosen
  if not isinstance(rows, str | Sequence):
    raise ValueError(f"{rows!r} is neither a name nor a list of colours")
  if not rows:
    return palette(count)
  whole = lambda n: isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= 255
  wrong = [row for row in rows if not (isinstance(row, Sequence) and len(row) == 3 and all(map(whole, row)))]
  if wrong:
    raise ValueError(f"{wrong[0]!r} is no colour; expected (red, green, blue) from 0 to 255")
  if len(rows) != count:
    raise ValueError(f"{len(rows)} colours for {count} classes")
  return np.array(rows, np.uint8)


def overlay(
  image: np.ndarray, classes: np.ndarray, colours: np.ndarray | None = None, strength: float = 0.6
) -> np.ndarray:
  """Colours of the classes laid over images [..., H, W, 3]; classes [..., H, W], 255 = none. colours: uint8 [C, 3]."""
  table = (palette(256) if colours is None else np.resize(colours, (256, 3))) / 255.0
  mixed = (1 - strength) * image + strength * table[classes]
  return np.where((classes == 255)[..., None], image * 0.4, mixed)


def legend(picture: np.ndarray, entries: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
  """A picture uint8 [H, W, 3] with squares of colour and their texts below, in columns, the first one downwards."""
  size = min(max(picture.shape[1] // 50, 13), 32)  # of the letters
  font, gap, line = ImageFont.load_default(size), size // 2, size + size // 2
  texts = [_one_line(text) for _, text in entries]
  column = max([round(font.getlength(text)) for text in texts], default=0) + line + 2 * gap
  width = max(picture.shape[1], column + gap)
  columns = min(max((width - gap) // column, 1), max(len(texts), 1))
  rows = -(-len(texts) // columns)
  sheet = Image.new("RGB", (width, picture.shape[0] + rows * line + 2 * gap), "white")
  sheet.paste(Image.fromarray(picture), ((width - picture.shape[1]) // 2, 0))
  draw = ImageDraw.Draw(sheet)
  for i, ((colour, _), text) in enumerate(zip(entries, texts, strict=True)):
    x, y = gap + i // rows * column, picture.shape[0] + gap + i % rows * line
    draw.rectangle((x, y, x + size, y + size), fill=tuple(map(int, colour)), outline="grey")
    draw.text((x + line, y + size // 2), text, fill="black", font=font, anchor="lm")
  return np.asarray(sheet)


def _one_line(text: str, limit: int = 48) -> str:
  text = " ".join(text.split())
  return text if len(text) <= limit else text[: limit - 3] + "..."


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
