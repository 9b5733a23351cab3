"""Decodes, crops and resizes images on the host.

The two-view crop follows unilm `beit/datasets.py` and `beit/transforms.py`: one random box, resized twice. Functions
with randomness take a generator as an argument. Training uses faster libraries (`jpeg.py`, `resize.py`); evaluation
resizes with Pillow, like the code behind the published numbers.
"""

import contextlib
import functools
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from beit_jax.data import jpeg
from beit_jax.data import pixels as pixels_lib
from beit_jax.data.pixels import MAX_VALUES, NPY, RGB, PixelRule, to_channels, to_uint8
from beit_jax.data.resize import Box, View, mirrored, resize, resize_with_pillow
from beit_jax.errors import BadImage

MAX_PIXELS = 2**26  # of an encoded image, checked before it is decoded: 8,192 x 8,192
MAX_WEBP_PIXELS = 3 * 2**24  # the WebP decoder holds four copies
MAX_ASPECT = 64  # of an image that is resized without a crop; of a narrower one only the central part is used
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # not EPS, which runs a program
RESIZES = ("short_side", "squash")
CROPS = ("random_resized", "pad", "center")
# EXIF orientation -> the operation that turns the image upright; 1 is upright already.
TRANSPOSE = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
ViewSizes = dict[str, View]  # name -> ((height, width), interpolation)


def _from_pillow(image: Image.Image, rule: PixelRule) -> np.ndarray:
  """Decodes an image that Pillow has opened: uint8 [H, W, C], upright."""
  pages = getattr(image, "n_frames", 1) if image.format == "TIFF" and rule.channels != 3 else 1
  if pages == 1:
    return _page(image, rule)
  if pages != rule.channels:
    raise BadImage(f"it has {pages} pages, but the model has model.in_channels={rule.channels}")
  if image.width * image.height * pages > MAX_VALUES:
    raise ValueError(
      f"{image.width}x{image.height} pixels of {pages} pages are more than {MAX_VALUES:,} values"
    )
  result = []
  for page in range(pages):
    image.seek(page)
    if len(image.getbands()) != 1:
      raise BadImage(f"page {page + 1} of {pages} has mode {image.mode}, expected one channel a page")
    result.append(_page(image, PixelRule(1, rule.value_range)))
  return np.concatenate(result, 2)


def _page(image: Image.Image, rule: PixelRule) -> np.ndarray:
  has_deep_colors = len(image.getbands()) > 1 and ";16" in str(getattr(image, "tile", ""))
  usual_range = pixels_lib.usual_range(image)
  image.load()  # before the EXIF block is read, which may follow the pixels
  image = _upright(image, _orientation(image))
  if image.mode.startswith("I") or image.mode == "F":
    return to_channels(to_uint8(image, rule.value_range, usual_range), rule.channels)
  if image.mode == "P" and "transparency" in image.info:
    image = image.convert("RGBA")
  if rule.channels in (1, 3):
    mode = "L" if rule.channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # which copies also where nothing changes
  elif image.mode not in ("LA", "RGBA", "CMYK") or len(image.getbands()) != rule.channels:
    raise BadImage(f"it has mode {image.mode}, but the model has model.in_channels={rule.channels}")
  pixels = to_channels(np.asarray(image), rule.channels)
  if has_deep_colors:
    pixels = pixels_lib.deep_colors(pixels, rule.value_range)
  return pixels if rule.value_range is None else to_uint8(pixels, rule.value_range, (0, 255))


@functools.cache
def formats() -> tuple[str, ...]:
  """The formats of `FORMATS` that this Pillow can open."""
  Image.init()
  return tuple(name for name in FORMATS if name in Image.OPEN)


def _plain_jpeg(encoded: bytes) -> Image.Image | None:
  """The opened header of a plain JPEG."""
  header = None if encoded.startswith(NPY) else open_image(encoded)
  return header if header is not None and jpeg.is_plain(header) else None


def open_image(encoded: bytes) -> Image.Image:
  """Opens an encoded image; reads its header only.

  Raises:
    ValueError: the file is empty, or the image has too many pixels.
    BadImage: it is a TIFF of a form that Pillow does not read.
    Exception: any error of Pillow's readers.
  """
  if not encoded:
    raise ValueError("the file is empty")
  try:
    image = Image.open(io.BytesIO(encoded), formats=formats())
  except Image.UnidentifiedImageError:
    if encoded.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
      raise BadImage(
        "Pillow does not read this TIFF, which is damaged or has many channels in one page; save it with one page for "
        "each channel, or as .npy"
      ) from None
    raise
  limit = MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS
  if image.width * image.height > limit:
    raise ValueError(f"{image.width}x{image.height} pixels are more than {limit:,}")
  return image


def _orientation(image: Image.Image) -> int:
  """The EXIF orientation, 1 to 8; 1 if there is none, or the EXIF block is damaged."""
  try:
    value = image.getexif().get(ExifTags.Base.Orientation)
    return int(value) if value in TRANSPOSE else 1
  except Exception:  # damaged bytes make Pillow's EXIF reader raise almost anything
    return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
  return image.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else image


def decode(image: Any, rule: PixelRule = RGB) -> np.ndarray:
  """Decodes an image to uint8 [H, W, C].

  Args:
    image: encoded bytes (of an image, or of a `.npy` file), an array [H, W] or [H, W, C], a `LazyImage`, or an image of
      Pillow. Images are turned upright as their EXIF orientation says; a damaged EXIF block is ignored.
    rule: how values become pixels. A `LazyImage` has its own.

  Raises:
    ValueError: the file is empty, or the image has too many pixels or another shape.
    BadImage: a `LazyImage` is damaged, or the rule does not fit the image.
    Exception: any error of Pillow's readers.
  """
  if isinstance(image, LazyImage):
    return image.pixels()
  if isinstance(image, bytes):
    image = pixels_lib.read_npy(image) if image.startswith(NPY) else open_image(image)
  return (
    _from_pillow(image, rule)
    if isinstance(image, Image.Image)
    else pixels_lib.from_array(np.asarray(image), rule)
  )


@contextlib.contextmanager
def decoding(name: str, advice: str = "") -> Iterator[None]:
  """Turns whatever Pillow raises inside the block into a `BadImage` that names the file."""
  try:
    yield
  except Image.UnidentifiedImageError:
    raise BadImage(f"{name} cannot be decoded: not an image of a supported format{advice}") from None
  except BadImage as error:  # says what to do
    raise BadImage(f"{name} cannot be decoded: {error}") from None
  except Exception as error:  # damaged bytes make Pillow's readers raise almost anything
    raise BadImage(f"{name} cannot be decoded: {str(error) or type(error).__name__}{advice}") from None


class LazyImage:
  """An image whose header has been read. The pixels of a plain JPEG are decoded on access.

  The pixels are bit-identical to those of `decode`.

  Args:
    image: as for `decode`.
    name: names the image in errors.
    rule: as for `decode`.

  Attributes:
    size: (width, height), upright.

  Raises:
    BadImage: the image cannot be decoded. Decoding is lazy: the methods may raise it too.
  """

  def __init__(self, image: Any, name: str = "the image", rule: PixelRule = RGB):
    self._name, self._encoded, self._orientation = name, b"", 1
    self.size: tuple[int, int]
    with self._decoding():
      if rule == RGB and isinstance(image, bytes) and (header := _plain_jpeg(image)):
        self._encoded, self._stored_size, self._orientation = image, header.size, _orientation(header)
        self.size = header.size[::-1] if self._orientation >= 5 else header.size
        return
      self._array = decode(image, rule)
    self.size = (self._array.shape[1], self._array.shape[0])

  def _decoding(self) -> contextlib.AbstractContextManager[None]:
    return decoding(self._name, "; remove or repair it")

  def pixels(self) -> np.ndarray:
    """The decoded image, uint8 [H, W, C]."""
    return self.shrunk(1)[0]

  def decoded(self) -> "LazyImage":
    """The same image, decoded now, for several crops of one image."""
    self._array, self._encoded = self.pixels(), b""
    return self

  def shrunk(self, factor: int) -> tuple[np.ndarray, int]:
    """Decodes at a lower resolution where that saves work.

    Args:
      factor: 1, 2, 4 or 8.

    Returns:
      (uint8 [ceil(H / f), ceil(W / f), C], f), where f is `factor` or less.
    """
    if not self._encoded:
      return self._array, 1
    while self._orientation != 1 and any(side % factor for side in self.size):
      factor //= 2  # the incomplete last row or column would end up at the wrong side
    pixels = jpeg.decode(self._encoded, self._stored_size, factor)
    if pixels is None:
      with self._decoding():
        return decode(self._encoded), 1
    if self._orientation != 1:
      pixels = np.asarray(_upright(Image.fromarray(pixels), self._orientation))
    return pixels, factor


def random_resized_box(
  rng: np.random.Generator, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
  """Draws the box of torchvision's RandomResizedCrop.

  Draws a uniform area and a log-uniform aspect ratio, up to ten times until the box fits. If none fits, returns the
  largest central box within the ratios.

  Args:
    rng: draws the box.
    width: of the image.
    height: of the image.
    scale: range of the area, as a fraction of the image.
    ratio: range of width / height.

  Returns:
    (left, top, right, bottom).
  """
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
      return left, top, left + w, top + h
  w = min(width, max(round(height * ratio[1]), 1))
  h = min(height, max(round(width / ratio[0]), 1))
  return _central_box(width, height, w, h)


def _central_box(width: int, height: int, w: int, h: int) -> Box:
  left, top = round((width - w) / 2), round((height - h) / 2)
  return left, top, left + w, top + h


def train_views(
  image: Any,
  rng: np.random.Generator,
  views: ViewSizes,
  *,
  crop: str,
  scale: tuple[float, float],
  ratio: tuple[float, float],
  flip: bool,
  scaled: bool = False,
) -> dict[str, np.ndarray]:
  """Crops one random box, flips it at random, and resizes it to every view.

  Args:
    image: a `LazyImage`, or anything that `decode` takes.
    rng: draws the box, then the flip.
    views: the sizes to make.
    crop: "random_resized"; "pad" (zero padding by an eighth, then a random crop, for small images); "center" (the
      largest central box with the aspect ratio of the first view).
    scale: see `random_resized_box`, as `ratio`.
    flip: whether to flip with probability 1/2.
    scaled: decode JPEGs at a lower resolution where the box has more pixels than the views; the box is the same.

  Returns:
    {view: uint8 [H, W, C]}.

  Raises:
    BadImage: the image cannot be decoded.
  """
  lazy = image if isinstance(image, LazyImage) else LazyImage(image)
  first = next(iter(views.values()))[0]
  height, width = first
  box: Box
  if crop == "random_resized":
    box = random_resized_box(rng, *lazy.size, scale, ratio)
  elif crop == "pad":
    left, top = (int(rng.integers(0, 2 * (side // 8) + 1)) for side in (width, height))
    box = (left, top, left + width, top + height)
  else:
    unit = min(lazy.size[0] / width, lazy.size[1] / height)
    box = _central_box(*lazy.size, max(round(width * unit), 1), max(round(height * unit), 1))
  flipped = flip and rng.random() < 0.5
  if crop == "pad":
    (pixels,) = resize(lazy.pixels(), _limited_box(lazy.size), [(first, "bicubic")])
    pixels = np.pad(pixels, [(height // 8, height // 8), (width // 8, width // 8), (0, 0)])
  else:
    pixels, factor = lazy.shrunk(_max_shrink(box, views) if scaled else 1)
    if factor > 1:
      x0, y0, x1, y1 = (side / factor for side in box)
      box = x0, y0, x1, y1
  resized = resize(pixels, box, views.values())
  return dict(zip(views, map(mirrored, resized) if flipped else resized, strict=True))


def _max_shrink(box: Box, views: ViewSizes) -> int:
  """The largest factor by which the box may shrink without having fewer pixels than a view."""
  wide, high = box[2] - box[0], box[3] - box[1]
  room = min(min(wide / width, high / height) for (height, width), _ in views.values())
  return next((factor for factor in jpeg.SHRINKS if factor <= room), 1)


def eval_size(
  image_size: tuple[int, int], view: tuple[int, int], crop_pct: float, resize: str
) -> tuple[int, int]:
  """The size that an image is resized to before the center crop.

  Args:
    image_size: (height, width).
    view: (height, width) of the center crop.
    crop_pct: side of the crop as a fraction of the resized image.
    resize: "short_side" keeps the aspect ratio and just covers view / crop_pct; "squash" is view / crop_pct itself.

  Returns:
    (height, width), at least the view's.
  """
  scales = [target / crop_pct / side for target, side in zip(view, image_size, strict=True)]
  scales = [max(scales)] * 2 if resize == "short_side" else scales
  height, width = (
    max(round(side * scale), target) for side, scale, target in zip(image_size, scales, view, strict=True)
  )
  return height, width


def _limited_box(size: tuple[int, int]) -> Box:
  """The central box of at most `MAX_ASPECT`: resizing an image one pixel wide would exhaust the memory."""
  width, height = (min(side, MAX_ASPECT * min(size)) for side in size)
  return _central_box(*size, width, height)


def eval_views(
  image: LazyImage | np.ndarray, views: ViewSizes, *, crop_pct: float, resize: str = "short_side"
) -> dict[str, np.ndarray]:
  """Resizes to `eval_size` and crops the center.

  Args:
    image: a `LazyImage`, or pixels uint8 [H, W, C].
    views: the sizes to make.
    crop_pct: see `eval_size`, as `resize`.

  Returns:
    {view: uint8 [H, W, C]}.
  """
  pixels = image.pixels() if isinstance(image, LazyImage) else image
  height, width = pixels.shape[:2]
  if max(height, width) > MAX_ASPECT * min(height, width):
    pixels = _cut(pixels, _limited_box((width, height)))
  result = {}
  for name, ((height, width), interpolation) in views.items():
    size = eval_size((pixels.shape[0], pixels.shape[1]), (height, width), crop_pct, resize)
    resized = resize_with_pillow(pixels, size, interpolation)
    result[name] = np.ascontiguousarray(_cut(resized, _central_box(*size[::-1], width, height)))
  return result


def _cut(pixels: np.ndarray, box: Box) -> np.ndarray:
  left, top, right, bottom = map(int, box)
  return pixels[top:bottom, left:right]
