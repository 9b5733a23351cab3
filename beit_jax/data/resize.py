"""Crop and resize for training: `cykooz-resizer`, SIMD code with Pillow's filters, 51 to 57 dB from Pillow's pixels.

Integer arithmetic: the pixels are the same with and without SIMD (`test_resizing_does_not_depend_on_the_processor`).
There are no wheels of it for Linux on ARM; there Pillow resizes, and a run says so.
"""

import functools
import math
import platform
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from beit_jax.errors import UserError
from beit_jax.runtime.logs import log

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
PIXELS = (
  "cykooz-resizer" if fast else "Pillow"
)  # what resizes: a token cache is refused where this is another
FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom", "lanczos": "lanczos3"}
RGB = fast and fast.PixelType.U8x3
Box = tuple[float, float, float, float]  # left, top, right, bottom
Target = tuple[tuple[int, int], str]  # (H, W), interpolation


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


def resize(pixels: np.ndarray, box: Box, targets: Iterable[Target]) -> list[np.ndarray]:
  """The box of uint8 [h, w, 3], resized to every target: uint8 [H, W, 3]. What lies outside the box has no influence.

  A box that cuts through pixels has them at their share.
  """
  left, top, right, bottom = box
  x, y = int(left), int(top)
  crop = pixels[y : math.ceil(bottom), x : math.ceil(right)]
  height, width = crop.shape[:2]
  inner = (left - x, top - y, right - x, bottom - y)
  part = None if inner == (0, 0, width, height) else inner
  convert = _pillow if fast is None else _fast
  source, made = None, []
  for size, interpolation in targets:
    if part is None and (height, width) == tuple(size):
      made.append(np.ascontiguousarray(crop))
      continue
    if source is None:
      source = Image.fromarray(crop) if fast is None else fast.ImageData(width, height, RGB, crop.tobytes())
    made.append(convert(source, part, size, interpolation))
  return made


def _pillow(source: Image.Image, part: Box | None, size: tuple[int, int], interpolation: str) -> np.ndarray:
  return np.asarray(source.resize(size[::-1], RESAMPLE[interpolation], part))


def _fast(source: Any, part: Box | None, size: tuple[int, int], interpolation: str) -> np.ndarray:
  options = _options(interpolation)
  if part is not None:
    options = options.copy()
    options.crop_box = fast.CropBox(part[0], part[1], part[2] - part[0], part[3] - part[1])
  target = fast.ImageData(size[1], size[0], RGB)
  fast.Resizer().resize(source, target, options)  # one for each call: threads must not share one
  return np.frombuffer(target.get_buffer(), np.uint8).reshape(*size, 3)


def mirrored(pixels: np.ndarray) -> np.ndarray:
  """Left for right, uint8 [H, W, 3]; by channel, since NumPy is four times slower with an inner loop of three."""
  result = np.empty(pixels.shape, np.uint8)
  for channel in range(3):
    result[..., channel] = pixels[:, ::-1, channel]
  return result
