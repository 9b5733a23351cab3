"""Decoding, cropping and resizing on the host, uint8 out.

The two-view crop follows unilm `beit/datasets.py` and `beit/transforms.py`: one random box, resized twice.
Every function takes its randomness as an argument. Training views are made for speed (`jpeg.py`, `resize.py`);
evaluation resizes with Pillow, as those do whose numbers it is compared with.
"""

import contextlib
import functools
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from beit_jax.data import jpeg
from beit_jax.data.resize import RESAMPLE, mirrored, resize
from beit_jax.errors import BadImage

MAX_PIXELS = 2**26  # of an encoded picture, checked before it is decoded: 8,192 x 8,192
MAX_WEBP_PIXELS = 3 * 2**24  # its decoder holds four copies
MAX_ASPECT = 64  # of a picture that is resized as a whole; of a narrower one the central part is seen
STRIP = 2**20  # pixels that are scaled at a time
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # EPS would run a program
RESIZES = ("short_side", "squash")
CROPS = ("random_resized", "pad", "center")
ENOUGH = 1  # times the pixels of a view, to each side: what a picture decoded to fewer pixels must still have
Box = tuple[int, int, int, int]  # left, top, right, bottom


def to_rgb(image: Image.Image) -> Image.Image:
  """Any Pillow mode -> RGB. 16-bit and float greys are scaled to 8 bits, which `convert` would clip."""
  if image.mode.startswith("I") or image.mode == "F":
    deep = any(part.max(initial=0) > 255 for part in _strips(image))
    grey = [(part / 257.0 if deep else part).clip(0, 255).round().astype(np.uint8) for part in _strips(image)]
    image = Image.fromarray(np.concatenate(grey), "L")  # 65535 -> 255
  elif image.mode == "P" and "transparency" in image.info:
    image = image.convert("RGBA")
  return image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[np.ndarray]:
  """A one-channel picture as float64, some rows at a time: as a whole it could be half a GiB. NaN is 0."""
  rows = max(STRIP // image.width, 1)
  for top in range(0, image.height, rows):
    part = image.crop((0, top, image.width, min(top + rows, image.height)))
    yield np.nan_to_num(np.asarray(part).astype(np.float64), posinf=np.inf, neginf=-np.inf)


@functools.cache
def _formats() -> tuple[str, ...]:
  Image.init()
  return tuple(name for name in FORMATS if name in Image.OPEN)


def open_picture(encoded: bytes) -> Image.Image:
  """Reads the header only.

  Raises:
    ValueError: the picture is absurdly large. Pillow's errors, for whatever else is wrong.
  """
  if not encoded:
    raise ValueError("the file is empty")
  image = Image.open(io.BytesIO(encoded), formats=_formats())
  limit = MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS
  if image.width * image.height > limit:
    raise ValueError(f"{image.width}x{image.height} pixels are more than {limit:,}")
  return image


def _upright(image: Image.Image) -> Image.Image:
  image.load()  # damaged pixels are an error, damaged EXIF is not
  try:
    ImageOps.exif_transpose(image, in_place=True)
  except Exception:  # Pillow's EXIF reader raises whatever the bytes lead it into
    pass
  return image


def decode(image: Any) -> Image.Image:
  """Encoded bytes, a uint8 array [H, W, 3 or 1], a `LazyImage`, or what this returned before -> Pillow image in RGB.

  Encoded pictures are turned upright as their EXIF orientation says; a damaged EXIF block says nothing. Transparency
  is dropped.
  """
  if isinstance(image, bytes):
    return to_rgb(_upright(open_picture(image)))
  if isinstance(image, Image.Image):
    return image
  if isinstance(image, LazyImage):
    return Image.fromarray(image.pixels())
  array = np.asarray(image)
  return to_rgb(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array))


@contextlib.contextmanager
def _blamed_on(name: str) -> Iterator[None]:
  try:
    yield
  except Image.UnidentifiedImageError:
    raise BadImage(
      f"{name} cannot be decoded: no picture of a kind that is read; remove or repair it"
    ) from None
  except Exception as error:  # Pillow's readers let through whatever a damaged file leads to
    reason = str(error) or type(error).__name__
    raise BadImage(f"{name} cannot be decoded: {reason}; remove or repair it") from None


class LazyImage:
  """A picture of which the header has been read. A plain JPEG is decoded when its pixels are asked for.

  Args:
    image: as for `decode`, whose pixels these are to the bit.
    name: for errors.

  Attributes:
    size: (width, height), upright.

  Raises:
    BadImage: it cannot be decoded; names it. So do the methods.
  """

  def __init__(self, image: Any, name: str = "the picture"):
    self._name, self._encoded, self._turn = name, b"", None
    size = jpeg.plain_size(image) if isinstance(image, bytes) else None
    if size and size[0] * size[1] <= MAX_PIXELS:
      self._encoded, self._stored, self.size = image, size, size
      return
    with _blamed_on(name):
      header = open_picture(image) if isinstance(image, bytes) else None
      if header is not None and jpeg.is_plain(header):
        self._encoded, self._turn, self._stored = image, jpeg.turn(header), header.size
        self.size = self._stored[::-1] if self._turn and self._turn[0] else self._stored
        return
      plain = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,)
      self._array = image if plain else np.asarray(decode(image))
    self.size = (self._array.shape[1], self._array.shape[0])

  def pixels(self) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return self.shrunk(1)[0]

  def shrunk(self, factor: int) -> tuple[np.ndarray, int]:
    """Decoded to the factor-th part of each side if that saves work: (uint8 [ceil(H / f), ceil(W / f), 3], f).

    factor: 1, 2, 4 or 8; f is that, or less.
    """
    if not self._encoded:
      return self._array, 1
    while self._turn and any(side % factor for side in self.size):  # the cut edge would be at the wrong side
      factor //= 2
    pixels = jpeg.decode(self._encoded, self._stored, factor)
    if pixels is not None:
      return jpeg.turned(pixels, self._turn), factor
    with _blamed_on(self._name):
      return np.asarray(decode(self._encoded)), 1


def random_resized_box(
  rng: np.random.Generator, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
  """torchvision's RandomResizedCrop: ten tries at area and log-uniform aspect, then the largest central box."""
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
      return left, top, left + w, top + h
  w = min(width, max(round(height * ratio[1]), 1))
  h = min(height, max(round(width / ratio[0]), 1))
  return _central(width, height, w, h)


def _central(width: int, height: int, w: int, h: int) -> Box:
  left, top = round((width - w) / 2), round((height - h) / 2)
  return left, top, left + w, top + h


ViewSizes = dict[str, tuple[tuple[int, int], str]]  # name -> ((H, W), interpolation)


def train_views(
  image: Any,
  rng: np.random.Generator,
  views: ViewSizes,
  *,
  crop: str,
  scale,
  ratio,
  flip: bool,
  scaled: bool = False,
) -> dict:
  """One random box and flip, resized to every view: {name: uint8 [H, W, 3]}. `image`: as for `LazyImage`, or one.

  Args:
    crop: "random_resized"; "pad" (reflect-free: zero padding by an eighth, then a random crop, for small images);
      "center" (none: the largest central box of the first view's shape).
    scaled: decode JPEGs to fewer pixels where the box has more than enough; the box is the same.

  Raises:
    BadImage: the picture cannot be decoded.
  """
  picture = image if isinstance(image, LazyImage) else LazyImage(image)
  first, factor = next(iter(views.values()))[0], 1
  if crop == "random_resized":
    box = random_resized_box(rng, *picture.size, scale, ratio)
  elif crop == "pad":
    height, width = first
    left, top = (int(rng.integers(0, 2 * (side // 8) + 1)) for side in (width, height))
    box = (left, top, left + width, top + height)
  else:
    box = _largest_box(picture.size, first)
  flipped = flip and rng.random() < 0.5
  if scaled and crop != "pad":
    factor = _spare(box, views)
  pixels, factor = picture.shrunk(factor)
  if crop == "pad":
    (pixels,) = resize(pixels, _without_ends(picture.size), [(first, "bicubic")])
    pixels = np.pad(pixels, [(side // 8, side // 8) for side in first] + [(0, 0)])
  elif factor > 1:
    box = tuple(side / factor for side in box)
  made = resize(pixels, box, views.values())
  return dict(zip(views, map(mirrored, made) if flipped else made, strict=True))


def _spare(box: Box, views: ViewSizes) -> int:
  """By how much a box may shrink for `ENOUGH` to be left for every view."""
  wide, high = box[2] - box[0], box[3] - box[1]
  room = min(min(wide / width, high / height) for (height, width), _ in views.values())
  return next((factor for factor in jpeg.SHRINKS if factor * ENOUGH <= room), 1)


def _largest_box(image_size: tuple[int, int], view: tuple[int, int], crop_pct: float = 1.0) -> Box:
  """The central box of the view's aspect that covers `crop_pct` of the image's shorter fit."""
  width, height = image_size
  unit = min(width / view[1], height / view[0]) * crop_pct
  return _central(width, height, max(round(view[1] * unit), 1), max(round(view[0] * unit), 1))


def eval_size(
  image_size: tuple[int, int], view: tuple[int, int], crop_pct: float, resize: str
) -> tuple[int, int]:
  """(height, width) that an image of (height, width) is resized to before the centre crop of the view's size.

  resize: "short_side" keeps the aspect and just covers view / crop_pct; "squash" is view / crop_pct itself.
  """
  scales = [target / crop_pct / side for target, side in zip(view, image_size, strict=True)]
  scales = [max(scales)] * 2 if resize == "short_side" else scales
  height, width = (
    max(round(side * scale), target) for side, scale, target in zip(image_size, scales, view, strict=True)
  )
  return height, width


def _without_ends(size: tuple[int, int]) -> Box:
  """The central box of at most `MAX_ASPECT`: to resize a line of pixels takes more memory than there is."""
  return _central(*size, *(min(side, MAX_ASPECT * min(size)) for side in size))


def eval_views(image: Any, views: ViewSizes, *, crop_pct: float, resize: str = "short_side") -> dict:
  """Resized to `eval_size`, then a centre crop of the view's size: {name: uint8 [H, W, 3]}."""
  image = decode(image)
  if max(image.size) > MAX_ASPECT * min(image.size):
    image = image.crop(_without_ends(image.size))
  result = {}
  for name, ((height, width), interpolation) in views.items():
    size = eval_size((image.height, image.width), (height, width), crop_pct, resize)[::-1]
    resized = image if image.size == size else image.resize(size, RESAMPLE[interpolation])
    result[name] = np.asarray(resized.crop(_central(*size, width, height)))
  return result
