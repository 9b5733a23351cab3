"""Crop and resize for training: `cykooz-resizer`, SIMD code with Pillow's filters, 51 to 57 dB from Pillow's pixels.

Integer arithmetic: the pixels do not depend on the processor (`test_resizing_does_not_depend_on_the_processor`). There
are no wheels of it for Linux on ARM; there Pillow resizes, and a run says so.
"""

import functools
import platform
import sys

import numpy as np
from PIL import Image

from beit_jax.errors import UserError
from beit_jax.logs import log

try:
  import cykooz_resizer as fast
except ImportError:
  fast = None

RESAMPLE = {
  "nearest": Image.Resampling.NEAREST,
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
}
FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom", "lanczos": "lanczos3"}
Box = tuple[float, float, float, float]  # left, top, right, bottom


@functools.cache
def check() -> None:
  """Says once which code resizes, where it is not the usual one.

  Raises:
    UserError: the usual one is missing where it can be installed: pixels would differ from those of other machines.
  """
  if fast is not None:
    return
  if sys.platform == "linux" and platform.machine() == "aarch64":
    log.info("training pictures are resized by Pillow: slower, and not to the bit as on other machines")
    return
  raise UserError(
    "cykooz-resizer, which resizes training pictures, is not installed: pip install 'cykooz-resizer>=4.0.1,<5'"
  )


@functools.cache
def _options(interpolation: str):
  algorithm = fast.ResizeAlg.nearest()
  if interpolation != "nearest":
    algorithm = fast.ResizeAlg.convolution(fast.FilterType[FILTERS[interpolation]])
  return fast.ResizeOptions(resize_alg=algorithm)


def resize(pixels: np.ndarray, box: Box, size: tuple[int, int], interpolation: str) -> np.ndarray:
  """The box of uint8 [h, w, 3], resized to size (H, W): uint8 [H, W, 3]. What lies outside the box has no influence.

  A box that cuts through pixels has them at their share.
  """
  left, top, right, bottom = box
  x, y = int(left), int(top)
  crop = pixels[y : int(np.ceil(bottom)), x : int(np.ceil(right))]
  height, width = crop.shape[:2]
  inner = (left - x, top - y, right - x, bottom - y)
  whole = inner == (0, 0, width, height)
  if whole and (height, width) == tuple(size):
    return np.ascontiguousarray(crop)
  if fast is None:
    image = Image.fromarray(crop).resize(size[::-1], RESAMPLE[interpolation], None if whole else inner)
    return np.asarray(image)
  options = _options(interpolation)
  if not whole:
    options = options.copy()
    options.crop_box = fast.CropBox(inner[0], inner[1], right - left, bottom - top)
  kind = fast.PixelType.U8x3
  target = fast.ImageData(size[1], size[0], kind)
  fast.Resizer().resize(fast.ImageData(width, height, kind, crop.tobytes()), target, options)
  return np.frombuffer(target.get_buffer(), np.uint8).reshape(*size, 3)


def mirrored(pixels: np.ndarray) -> np.ndarray:
  """Left for right, uint8 [H, W, 3]; by channel, since NumPy is four times slower with an inner loop of three."""
  result = np.empty(pixels.shape, np.uint8)
  for channel in range(3):
    result[..., channel] = pixels[:, ::-1, channel]
  return result
