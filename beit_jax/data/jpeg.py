"""Plain JPEGs by libjpeg-turbo, straight into an array: the very pixels that Pillow decodes, sooner.

Only what the library reads without a word of complaint is taken from it. Everything else is left to Pillow, so that
what is a damaged picture, and what is said about it, does not depend on who decodes.
"""

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

SHRINKS = (8, 4, 2)  # by which the library can decode to fewer pixels, at less work
# EXIF orientation -> (axes swapped, rows reversed, columns reversed); the swap comes first.
TURNS = {
  2: (False, False, True),
  3: (False, True, True),
  4: (False, True, False),
  5: (True, False, False),
  6: (True, False, True),
  7: (True, True, True),
  8: (True, True, False),
}
Turn = tuple[bool, bool, bool]


def plain_size(encoded: bytes) -> tuple[int, int] | None:
  """(width, height) of an 8-bit JPEG in colour or grey whose header holds nothing but what decoding needs; else None.

  Most of ImageNet is such. Pillow's objects for a header cost a tenth of the time of decoding.
  """
  size, at = None, 2
  while encoded[:2] == b"\xff\xd8" and at + 4 <= len(encoded) and encoded[at] == 0xFF:
    kind, length = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4], "big")
    part = encoded[at + 4 : at + 2 + length]
    if kind == 0xDA:  # the scan begins
      return size
    if length < 2 or len(part) != length - 2:
      return None
    if kind in (0xC0, 0xC2):  # baseline or progressive
      if size or length < 8 or part[0] != 8 or part[5] not in (1, 3) or length != 8 + 3 * part[5]:
        return None
      size = int.from_bytes(part[3:5], "big"), int.from_bytes(part[1:3], "big")
      if not min(size):
        return None
    elif kind == 0xDB:  # quantization tables of 8 bits
      if not part or len(part) % 65 or max(part[::65]) > 15:
        return None
    elif not (
      kind in (0xC4, 0xFE)  # Huffman tables, a comment
      or (kind == 0xDD and length == 4)  # restarts
      or (kind == 0xE0 and length == 16 and part[:5] == b"JFIF\0")
      or (kind == 0xEE and length == 14 and part[:5] == b"Adobe")
    ):
      return None
    at += 2 + length
  return None


def is_plain(header: Image.Image) -> bool:
  """Whether a picture that Pillow has opened is an 8-bit JPEG in colour or grey: no CMYK, no second picture in it."""
  return header.format == "JPEG" and header.mode in ("RGB", "L")


def turn(header: Image.Image) -> Turn | None:
  """What makes the picture upright, or None; a damaged EXIF block says nothing."""
  try:
    return TURNS.get(header.getexif().get(ExifTags.Base.Orientation))
  except Exception:  # Pillow's EXIF reader raises whatever the bytes lead it into
    return None


def turned(pixels: np.ndarray, how: Turn | None) -> np.ndarray:
  """A view of [H, W, 3]."""
  if how is None:
    return pixels
  swap, rows, columns = how
  pixels = pixels.swapaxes(0, 1) if swap else pixels
  return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def decode(encoded: bytes, size: tuple[int, int], shrink: int = 1) -> np.ndarray | None:
  """A plain JPEG -> uint8 [ceil(H / shrink), ceil(W / shrink), 3]; None where the library has any objection.

  Args:
    size: (width, height) as Pillow reads them, and as `open_picture` has found them to be no bomb.
    shrink: 1, or one of `SHRINKS`: frequencies that fewer pixels cannot show are left out of the inverse DCT.
  """
  width, height = size
  shape = -(-height // shrink), -(-width // shrink), 3
  try:
    if simplejpeg.decode_jpeg_header(encoded)[:2] != (height, width):
      return None
    pixels = simplejpeg.decode_jpeg(
      encoded, "RGB", min_height=shape[0], min_width=shape[1], min_factor=shrink
    )
  except ValueError:  # whatever it is, warnings among them
    return None
  return pixels if pixels.shape == shape else None
