"""Decoding, cropping and resizing on the host: Pillow and NumPy, uint8 out.

The two-view crop follows unilm `beit/datasets.py` and `beit/transforms.py`: one random box, resized twice.
Every function takes its randomness as an argument.
"""

import functools
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps

RESAMPLE = {
  "nearest": Image.Resampling.NEAREST,
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
}
MAX_PIXELS = 2**26  # of an encoded picture, checked before it is decoded: 8,192 x 8,192
MAX_WEBP_PIXELS = 3 * 2**24  # its decoder holds four copies
MAX_ASPECT = 64  # of an evaluated picture; of a narrower one the central part is seen
STRIP = 2**20  # pixels that are scaled at a time
PIXELS = "pillow"  # what decodes and resizes: a token cache is refused where this is another
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # EPS would run a program
RESIZES = ("short_side", "squash")
CROPS = ("random_resized", "pad", "center")
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
  """Encoded bytes, a uint8 array [H, W, 3 or 1], or what this returned before -> Pillow image in RGB.

  Encoded pictures are turned upright as their EXIF orientation says; a damaged EXIF block says nothing. Transparency
  is dropped.
  """
  if isinstance(image, bytes):
    return to_rgb(_upright(open_picture(image)))
  if isinstance(image, Image.Image):
    return image
  array = np.asarray(image)
  return to_rgb(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array))


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


def _resize(
  image: Image.Image, box: Box, size: tuple[int, int], interpolation: str, flip: bool
) -> np.ndarray:
  """Crop, then resize to size (H, W) if need be, then flip: uint8 [H, W, 3]."""
  image = image if box == (0, 0, *image.size) else image.crop(box)
  if image.size != (size[1], size[0]):
    image = image.resize((size[1], size[0]), RESAMPLE[interpolation])
  array = np.asarray(image)
  return np.ascontiguousarray(array[:, ::-1]) if flip else array


Views = dict[str, tuple[tuple[int, int], str]]  # name -> ((H, W), interpolation)


def train_views(
  image: Any, rng: np.random.Generator, views: Views, *, crop: str, scale, ratio, flip: bool
) -> dict:
  """One random box and flip, resized to every view: {name: uint8 [H, W, 3]}. `image`: as for `decode`.

  crop: "random_resized"; "pad" (reflect-free: zero padding by an eighth, then a random crop, for small images);
  "center" (none: the largest central box of the first view's shape).
  """
  image = decode(image)
  if crop == "random_resized":
    box = random_resized_box(rng, *image.size, scale, ratio)
  elif crop == "pad":
    height, width = next(iter(views.values()))[0]
    image = image if image.size == (width, height) else image.resize((width, height), RESAMPLE["bicubic"])
    left, top = (int(rng.integers(0, 2 * (side // 8) + 1)) - side // 8 for side in (width, height))
    box = (left, top, left + width, top + height)  # Pillow fills what lies outside with zeros
  else:
    box = _largest_box(image.size, next(iter(views.values()))[0])
  mirrored = flip and rng.random() < 0.5
  return {name: _resize(image, box, size, how, mirrored) for name, (size, how) in views.items()}


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


def eval_views(image: Any, views: Views, *, crop_pct: float, resize: str = "short_side") -> dict:
  """Resized to `eval_size`, then a centre crop of the view's size: {name: uint8 [H, W, 3]}."""
  image = decode(image)
  longest = MAX_ASPECT * min(
    image.size
  )  # a line of pixels would be resized to a picture that no memory holds
  if max(image.size) > longest:
    image = image.crop(_central(*image.size, *(min(side, longest) for side in image.size)))
  result = {}
  for name, ((height, width), interpolation) in views.items():
    size = eval_size((image.height, image.width), (height, width), crop_pct, resize)[::-1]
    resized = image if image.size == size else image.resize(size, RESAMPLE[interpolation])
    result[name] = _resize(resized, _central(*size, width, height), (height, width), interpolation, False)
  return result
