"""Contact sheets, overlays and class colors, drawn with Pillow.

Unless stated otherwise, functions take images as float [B, H, W, 3] in [0, 1] and return uint8 [H, W, 3].
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 8  # images in a row
CELL_HEIGHT = 96  # pixels of an image on a contact sheet
TITLE_HEIGHT = 16  # pixels of a line of text on a contact sheet
GAP = 4  # pixels between the images of a contact sheet
MASK_GRAY = 0.5
OVERLAY_OPACITY = 0.6  # of the class colors over an image
IGNORED = 255  # class number of pixels without a class
# Colors of the classes of known data sets, by class number.
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


def gray_out(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Paints the masked patches gray.

  Args:
    image: float [B, H, W, C].
    mask: bool [B, h, w], True = masked.

  Returns:
    float [B, H, W, C].
  """
  return paste(image, MASK_GRAY, mask)


def paste(image: np.ndarray, patches: np.ndarray | float, mask: np.ndarray) -> np.ndarray:
  """Replaces the masked patches of images by those of others, or by one value; shapes as in `gray_out`."""
  image, mask = np.asarray(image), np.asarray(mask)
  patch_height, patch_width = image.shape[1] // mask.shape[1], image.shape[2] // mask.shape[2]
  return np.where(mask.repeat(patch_height, 1).repeat(patch_width, 2)[..., None], patches, image)


def visible(image: np.ndarray) -> np.ndarray:
  """Returns [..., C] as [..., 3]: the first three channels, or the first one as gray."""
  return image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, -1)


@functools.cache
def palette(count: int) -> np.ndarray:
  """Generates up to 256 colors that are easy to tell apart: uint8 [count, 3].

  Colors are picked greedily from a grid: each is the one farthest from all colors before it, in a color space where
  distances match perception. The first n colors are therefore the same for every `count`. Near-black, near-white and
  gray colors are left out.
  """
  levels = np.linspace(0, 255, 9).round()
  grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
  points = _oklab(grid)
  lightness, chroma = points[:, 0], np.hypot(points[:, 1], points[:, 2])
  usable = (lightness > 0.3) & (lightness < 0.93) & (chroma > 0.03)
  grid, points = grid[usable], points[usable]
  red = _oklab(np.array([220.0, 32, 32]))
  chosen = [np.linalg.norm(points - red, axis=1).argmin()]  # the first color is red
  distance = np.full(len(points), np.inf)
  while len(chosen) < count:
    distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    chosen.append(distance.argmax())
  colors = grid[chosen[:count]].astype(np.uint8)
  colors.flags.writeable = False  # the cache returns the same array to every caller
  return colors


def _oklab(rgb: np.ndarray) -> np.ndarray:
  """Converts [..., 3] in 0 to 255 to Oklab (Ottosson, 2020); a gamma of 2.2 approximates that of sRGB."""
  cones = (rgb / 255.0) ** 2.2 @ np.array(
    [[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]]
  )
  return np.cbrt(cones) @ np.array(
    [[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]]
  )


def class_colors(chosen: str | Sequence[Any], count: int) -> np.ndarray:
  """Returns a color for each class.

  Args:
    chosen: a name in `PALETTES`, a (red, green, blue) triple in 0 to 255 for every class, or empty: `palette(count)`.
    count: number of classes.

  Returns:
    uint8 [count, 3].

  Raises:
    ValueError: `chosen` is none of these; the message says what is wrong.
  """
  if not chosen:
    return palette(count)
  colors = as_colors(chosen)
  if len(colors) != count:
    raise ValueError(f"{len(colors)} colors for {count} classes")
  return colors


def as_colors(chosen: str | Sequence[Any]) -> np.ndarray:
  """The colors of a palette, uint8 [n, 3].

  Args:
    chosen: a name in `PALETTES`, or (red, green, blue) triples in 0 to 255.

  Raises:
    ValueError: it is neither of these.
  """
  if isinstance(chosen, str) and chosen not in PALETTES:
    raise ValueError(f"{chosen!r} is unknown; known palettes are {', '.join(map(repr, PALETTES))}")
  colors = PALETTES[chosen] if isinstance(chosen, str) else chosen
  if not isinstance(colors, str | Sequence):
    raise ValueError(f"{colors!r} is neither a name nor a list of colors")
  for color in colors:
    if not (isinstance(color, Sequence) and len(color) == 3 and all(map(_is_byte, color))):
      raise ValueError(f"{color!r} is not a color; expected (red, green, blue) from 0 to 255")
  return np.array(colors, np.uint8)


def _is_byte(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def overlay(image: np.ndarray, classes: np.ndarray, colors: np.ndarray | None = None) -> np.ndarray:
  """Blends class colors over images and darkens the pixels without a class.

  Args:
    image: float [..., H, W, C] in [0, 1].
    classes: class numbers [..., H, W]; `IGNORED` (255) = no class.
    colors: uint8 [C, 3]; default: `palette`.

  Returns:
    float [..., H, W, 3] in [0, 1].
  """
  table = (palette(256) if colors is None else np.resize(colors, (256, 3))) / 255.0
  image = visible(image)
  mixed = (1 - OVERLAY_OPACITY) * image + OVERLAY_OPACITY * table[classes]
  return np.where((classes == IGNORED)[..., None], image * 0.4, mixed)


def add_legend(image: np.ndarray, entries: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
  """Draws a legend below an image: colored squares with texts, filled column by column.

  Args:
    image: uint8 [H, W, 3].
    entries: (color uint8 [3], text) in the order of the legend.

  Returns:
    uint8 [H + legend, W or wider, 3].
  """
  font_size = min(max(image.shape[1] // 50, 13), 32)
  font, gap, line = ImageFont.load_default(font_size), font_size // 2, font_size + font_size // 2
  texts = [_one_line(text) for _, text in entries]
  column = max([round(font.getlength(text)) for text in texts], default=0) + line + 2 * gap
  width = max(image.shape[1], column + gap)
  columns = min(max((width - gap) // column, 1), max(len(texts), 1))
  rows = -(-len(texts) // columns)
  sheet = Image.new("RGB", (width, image.shape[0] + rows * line + 2 * gap), "white")
  sheet.paste(Image.fromarray(image), ((width - image.shape[1]) // 2, 0))
  draw = ImageDraw.Draw(sheet)
  for i, ((color, _), text) in enumerate(zip(entries, texts, strict=True)):
    x, y = gap + i // rows * column, image.shape[0] + gap + i % rows * line
    draw.rectangle((x, y, x + font_size, y + font_size), fill=tuple(map(int, color)), outline="gray")
    draw.text((x + line, y + font_size // 2), text, fill="black", font=font, anchor="lm")
  return np.asarray(sheet)


def _one_line(text: str, limit: int = 48) -> str:
  text = " ".join(text.split())
  return text if len(text) <= limit else text[: limit - 3] + "..."


def _cell(image: np.ndarray) -> Image.Image:
  """Scales float [H, W, C] to the height of a cell; enlarged pixels stay squares."""
  cell = Image.fromarray((visible(image).clip(0, 1) * 255).round().astype(np.uint8))
  width = max(round(CELL_HEIGHT * image.shape[1] / image.shape[0]), 1)
  resample = Image.Resampling.NEAREST if width >= cell.width else Image.Resampling.LANCZOS
  return cell.resize((width, CELL_HEIGHT), resample)


def labeled_rows(rows: dict[str, np.ndarray], columns: int = COLUMNS) -> np.ndarray:
  """Draws one row of images per entry, with its name above it; at most `columns` images a row."""
  cells = {name: [_cell(image) for image in images[:columns]] for name, images in rows.items()}
  width = max(sum(cell.width + GAP for cell in row) for row in cells.values()) + GAP
  sheet = Image.new("RGB", (width, len(cells) * (CELL_HEIGHT + TITLE_HEIGHT + GAP) + GAP), "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
  y = GAP
  for name, row in cells.items():
    draw.text((GAP, y), name, fill="black", font=font)
    x = GAP
    for cell in row:
      sheet.paste(cell, (x, y + TITLE_HEIGHT))
      x += cell.width + GAP
    y += CELL_HEIGHT + TITLE_HEIGHT + GAP
  return np.asarray(sheet)


def captioned_grid(images: np.ndarray, captions: list[str], columns: int = 8) -> np.ndarray:
  """Draws up to two rows of images with a caption below each; captions that contain "(is" are red."""
  cells = [_cell(image) for image in images[: 2 * columns]]
  width = max(cell.width for cell in cells) + GAP
  rows = -(-len(cells) // columns)
  height = CELL_HEIGHT + TITLE_HEIGHT + GAP
  sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
  for i, (cell, caption) in enumerate(zip(cells, captions, strict=False)):
    x, y = GAP + i % columns * width, GAP + i // columns * height
    sheet.paste(cell, (x, y))
    color = "red" if "(is" in caption else "black"
    draw.text((x, y + CELL_HEIGHT + 1), caption[:18], fill=color, font=font)
  return np.asarray(sheet)
