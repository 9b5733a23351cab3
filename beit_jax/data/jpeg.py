"""Decodes common JPEGs with libjpeg-turbo: faster than Pillow, and bit-identical.

If the library reports an error or a warning, its result is discarded and Pillow decodes the file. So Pillow alone
decides which files are damaged, and its message is the one that is shown.
"""

import numpy as np
import simplejpeg
from PIL import Image

SHRINKS = (8, 4, 2)  # factors by which libjpeg-turbo can reduce each side while decoding, which saves work


def is_plain(header: Image.Image) -> bool:
  """Whether an image that Pillow has opened is an 8-bit color or gray JPEG: not CMYK, one image per file."""
  return header.format == "JPEG" and header.mode in ("RGB", "L")


def decode(encoded: bytes, size: tuple[int, int], shrink: int = 1) -> np.ndarray | None:
  """Decodes a plain JPEG; its EXIF orientation is ignored.

  Args:
    encoded: the file.
    size: (width, height) in the header as Pillow reads it, already checked against the limit of pixels.
    shrink: 1, or one of `SHRINKS`: leaves out frequencies that the smaller image cannot show.

  Returns:
    uint8 [ceil(H / shrink), ceil(W / shrink), 3], or None if the library reports an error or a warning.
  """
  width, height = size
  shape = -(-height // shrink), -(-width // shrink), 3
  try:
    if simplejpeg.decode_jpeg_header(encoded)[:2] != (height, width):
      return None
    pixels = simplejpeg.decode_jpeg(
      encoded, "RGB", min_height=shape[0], min_width=shape[1], min_factor=shrink
    )
  except ValueError:  # errors and warnings alike
    return None
  return pixels if pixels.shape == shape else None
