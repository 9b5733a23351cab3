"""Decodes label maps: one class number for every pixel, from files, arrays and colors."""

import re
from typing import Any

import numpy as np

from beit_jax.data import images
from beit_jax.errors import UserError

FORMATS = ("PNG", "BMP", "TIFF")
GRAY = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "F")  # Pillow's modes of one channel
SEVERAL = ("LA", "PA", "RGB", "RGBA")
SCALE = {"L;2": 85, "L;4": 17}  # what Pillow multiplies gray values of 2 and 4 bits by
ADVICE = "expected one channel of class numbers (an 8-bit gray or palette PNG), or segment.label_colors"


def decode_labels(
  encoded: Any,
  name: str,
  *,
  size: tuple[int, int] | None = None,
  colors: np.ndarray | None = None,
) -> np.ndarray:
  """Decodes a label map.

  Args:
    encoded: bytes of a PNG, BMP or TIFF, or an array [H, W] or [H, W, C]. Several channels are read only if all colors
      are the same and there is no transparency.
    name: names the label map in errors.
    size: (width, height) that it must have.
    colors: uint8 [n, 3]; if given, the label map has colors, and the result their positions in this list.

  Returns:
    integers [H, W], the values as stored.

  Raises:
    BadImage: the label map cannot be decoded.
    UserError: it has another size, or what it holds are no class numbers.
  """
  array, kind = encoded, "an array"
  if isinstance(encoded, bytes):
    array, kind = _read(encoded, name, size, as_colors=colors is not None)
  array = np.asarray(array)
  if array.ndim not in (2, 3) or array.dtype.kind not in "biuf":
    raise UserError(f"{name}: the label map is an array of {array.dtype} {array.shape}; {ADVICE}")
  _check_size((array.shape[1], array.shape[0]), size, name)
  if colors is not None:
    return _positions(_without_alpha(array, name), colors, name)
  return _one_channel(array, name, kind)


def _check_size(found: tuple[int, ...], size: tuple[int, int] | None, name: str) -> None:
  if size is not None and tuple(found) != tuple(size):
    raise UserError(f"{name}: the label map is {found[0]}x{found[1]} pixels, its image {size[0]}x{size[1]}")


def _read(
  encoded: bytes, name: str, size: tuple[int, int] | None, *, as_colors: bool
) -> tuple[np.ndarray, str]:
  """(pixels, mode) of a file. What the header shows to be no label map is refused before it is decoded."""
  with images.decoding(f"{name}: the label map"):
    image: Any = images.open_image(encoded)
    arguments = [tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in image.tile]
    stored, pages = str(arguments[0]), getattr(image, "n_frames", 1)
  _check_size(image.size, size, name)
  is_deep = any(";16" in str(argument) for argument in arguments)
  several = image.mode in SEVERAL and not is_deep  # Pillow keeps 8 of 16 bits of each channel
  what = f"{name}: the label map is a {image.format} of mode {image.mode}"
  if image.format not in FORMATS or pages > 1:
    found = f"{what} with {pages} pages" if pages > 1 else what
    raise UserError(f"{found}; expected one {' or '.join(FORMATS)}, which keep every value; JPEG does not")
  if not several and image.mode not in (GRAY[:3] if as_colors else GRAY):
    raise UserError(f"{what} ({stored}), a color image that cannot be read as class numbers; {ADVICE}")
  if re.match(r"[1L];\d?I", stored) and not as_colors:
    raise UserError(f"{what} that stores 0 as white, so it is unknown which values are meant; {ADVICE}")
  with images.decoding(f"{name}: the label map"):
    image.load()
    if as_colors:
      image = image.convert("RGBA" if image.mode.endswith("A") else "RGB")
    pixels = np.asarray(image)
  scale = 1 if as_colors else SCALE.get(stored, 1)
  return pixels // scale if scale > 1 else pixels, f"mode {image.mode}"


def _without_alpha(array: np.ndarray, name: str) -> np.ndarray:
  """The channels of [H, W] or [H, W, C] but alpha, which must be opaque; C = 2 and C = 4 have one."""
  if array.ndim == 2:
    return array[..., None]
  if array.shape[-1] not in (1, 2, 3, 4):
    raise UserError(f"{name}: the label map has {array.shape[-1]} channels; {ADVICE}")
  if array.shape[-1] in (1, 3):
    return array
  if array.dtype != np.uint8 or (array[..., -1] != 255).any():
    raise UserError(
      f"{name}: the label map has {array.shape[-1]} channels, the last one not opaque; {ADVICE}"
    )
  return array[..., :-1]


def _one_channel(array: np.ndarray, name: str, kind: str) -> np.ndarray:
  channels = _without_alpha(array, name)
  first = channels[..., 0]
  for i in range(1, channels.shape[-1]):
    if not np.array_equal(channels[..., i], first):
      raise UserError(f"{name}: the label map is a color image ({kind}, whose channels differ); {ADVICE}")
  if np.issubdtype(first.dtype, np.floating):
    with np.errstate(invalid="ignore"):
      whole = first.astype(np.int32)
    if not np.array_equal(whole, first):
      raise UserError(f"{name}: the label map has values that are no whole numbers; {ADVICE}")
    return whole
  small = {"b": np.uint8}.get(first.dtype.kind, np.int32)
  return first.astype(small) if first.dtype == bool or first.dtype.itemsize == 2 else first


def _positions(pixels: np.ndarray, colors: np.ndarray, name: str) -> np.ndarray:
  """uint8 [H, W]: the position of every pixel's color in `colors`; a gray value v is the color (v, v, v)."""
  if pixels.dtype != np.uint8:
    raise UserError(
      f"{name}: the label map has {pixels.dtype} values; segment.label_colors needs 8-bit colors"
    )
  weights = np.array([1 << 16, 1 << 8, 1], np.int32)
  codes = (pixels * weights).sum(-1, dtype=np.int32)
  known = colors.astype(np.int32) @ weights
  order = np.argsort(known)
  place = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
  unknown = known[order][place] != codes
  if unknown.any():
    row, column = np.argwhere(unknown)[0].tolist()
    color = tuple(np.broadcast_to(pixels[row, column], 3).tolist())
    raise UserError(
      f"{name}: the label map has the color {color} at row {row}, column {column}, which is not among the "
      f"{len(colors)} of segment.palette"
    )
  return order[place].astype(np.uint8)
