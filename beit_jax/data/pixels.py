"""Turns the values that a file stores into uint8 pixels, by one rule for all images of a data set."""

import io
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from beit_jax.errors import BadImage

MAX_VALUES = 3 * 2**26  # of an image: 8,192 x 8,192 pixels of three channels
STRIP_VALUES = 2**20  # of a deep image, scaled at a time
MIN_LEVELS = 32  # gray levels that must remain of a deep image if nobody says what its range is
SET_RANGE = "set data.value_range=(low, high), which holds for the whole data set"
BITS_PER_SAMPLE, SMIN_SAMPLE_VALUE, SMAX_SAMPLE_VALUE = 258, 340, 341  # TIFF tags
NPY = b"\x93NUMPY"  # how a .npy file begins


class PixelRule(NamedTuple):
  """How the stored values of all images of a data set become uint8 pixels.

  Attributes:
    channels: of the pixels. With 3, gray images become RGB and transparency is dropped. With 1, color images become
      gray. With another number, the file must have exactly so many channels or, as a TIFF, pages.
    value_range: stored values (low, high) that become 0 and 255; values between them are mapped linearly, others are
      clipped. None: the full range of 8-bit and of 16-bit images, and the range that a TIFF states in its tags.
  """

  channels: int = 3
  value_range: tuple[float, float] | None = None


RGB = PixelRule()


def to_channels(array: np.ndarray, channels: int) -> np.ndarray:
  """Returns an array [H, W] or [H, W, 1 or C] as [H, W, C]; gray becomes RGB.

  Raises:
    ValueError: the array has another shape, or holds no numbers.
  """
  found = f"{array.dtype} {list(array.shape)}"
  array = array[..., None] if array.ndim == 2 else array
  fits = array.ndim == 3 and (array.shape[2] == channels or (array.shape[2] == 1 and channels == 3))
  if not fits or not array.size or array.dtype.kind not in "buif":
    raise ValueError(f"found an array {found}, expected numbers [height, width, {channels}]")
  if array.size > MAX_VALUES:
    raise ValueError(f"an array {found} has more than {MAX_VALUES:,} values")
  return array if array.shape[2] == channels else np.repeat(array, channels, 2)


def to_uint8(
  image: Image.Image | np.ndarray, value_range: tuple[float, float] | None, usual_range: tuple[float, float]
) -> np.ndarray:
  """Maps the values of an image linearly to 0 to 255; NaN counts as 0.

  Args:
    image: [H, W] or [H, W, C].
    value_range: see `PixelRule`.
    usual_range: takes its place if it is None. Then no value may lie outside, and the gray levels must remain.

  Returns:
    uint8, of the same shape.

  Raises:
    BadImage: `value_range` is None, and the usual range is not that of the image.
  """
  low, high = value_range or usual_range
  lowest, highest, levels, parts = math.inf, -math.inf, np.zeros(256, bool), []
  for part in _strips(image):
    lowest, highest = min(lowest, float(part.min())), max(highest, float(part.max()))
    parts.append(((part - low) * (255 / (high - low))).clip(0, 255).round().astype(np.uint8))
    levels |= np.bincount(parts[-1].ravel(), minlength=256) > 0
  if value_range is None:
    count, found = int(levels.sum()), f"its values run from {lowest:g} to {highest:g}"
    if lowest < low or highest > high:
      raise BadImage(f"{found}, which exceeds the range from {low:g} to {high:g} of such files; {SET_RANGE}")
    stored = _count_levels(image) if count < MIN_LEVELS and lowest < highest else count
    if stored >= min(2 * count, MIN_LEVELS) > count:  # an image of few values may keep most of them
      raise BadImage(f"{found}, of which only {count} of 256 gray levels would remain; {SET_RANGE}")
  return np.concatenate(parts)


def _count_levels(image: Image.Image | np.ndarray) -> int:
  """The number of distinct values; at least `MIN_LEVELS` if there are so many."""
  found: set[float] = set()
  for part in _strips(image):
    found.update(np.unique(part).tolist())
    if len(found) >= MIN_LEVELS:
      break
  return len(found)


def _strips(image: Image.Image | np.ndarray) -> Iterator[np.ndarray]:
  """Yields an image in strips of float64 rows, which bounds the memory; NaN becomes 0."""
  if isinstance(image, np.ndarray):
    height, values = image.shape[0], math.prod(image.shape[1:])
  else:
    height, values = image.height, image.width
  rows = max(STRIP_VALUES // values, 1)
  for top in range(0, height, rows):
    end = min(top + rows, height)
    part = image[top:end] if isinstance(image, np.ndarray) else image.crop((0, top, image.width, end))
    yield np.nan_to_num(np.asarray(part).astype(np.float64), posinf=np.inf, neginf=-np.inf)


def usual_range(image: Image.Image) -> tuple[float, float]:
  """The range of values of a one-channel image of more than 8 bits, as its TIFF tags or its format say."""
  tags = getattr(image, "tag_v2", {})
  ends = [tags.get(tag) for tag in (SMIN_SAMPLE_VALUE, SMAX_SAMPLE_VALUE)]
  low, high = (end[0] if isinstance(end, tuple) and end else end for end in ends)
  if isinstance(low, int | float) and isinstance(high, int | float) and low < high:
    return float(low), float(high)
  if image.mode.startswith("I;16"):
    return 0, 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
  return 0, 65535 if image.mode == "I" and image.format in ("PNG", "PPM") else 255


def deep_colors(pixels: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
  """Checks 16-bit colors, of which Pillow keeps the upper 8 bits; with a range, returns them as 16-bit values."""
  low, high = value_range or (0, 65535)
  if high - low < 256 * MIN_LEVELS or (value_range is None and pixels.min() < pixels.max() < MIN_LEVELS):
    raise BadImage(
      f"its 16-bit colors are at most {256 * int(pixels.max()) + 255}, and Pillow reads the upper 8 bits only; convert "
      f"it to .npy and set data.value_range, or set data.value_range=(0, 65535) if it is as dark as that"
    )
  return pixels if value_range is None else pixels * np.uint16(257)


def from_array(array: np.ndarray, rule: PixelRule) -> np.ndarray:
  """Turns an array of stored values, [H, W] or [H, W, C], into uint8 [H, W, C]. Raises as `to_channels`, `to_uint8`."""
  array = to_channels(array, rule.channels)
  if array.dtype == np.uint8 and rule.value_range is None:
    return array
  return to_uint8(array, rule.value_range, (0, {"bool": 1, "uint16": 65535}.get(array.dtype.name, 255)))


def read_npy(encoded: bytes) -> np.ndarray:
  """Reads an array without copying; the file may be damaged."""
  file = io.BytesIO(encoded)
  version = np.lib.format.read_magic(file)
  header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  shape, is_fortran, dtype = header(file)
  array = np.frombuffer(encoded, dtype, math.prod(shape), file.tell())  # refuses objects
  return array.reshape(shape, order="F" if is_fortran else "C")
