"""Decodes, checks and augments images together with their label maps, on the host.

The steps are those of mmseg 0.11's pipeline as unilm configures it for ADE20K: random resize that keeps the aspect
ratio, a crop that no single class may fill (`cat_max_ratio`), flip, photometric distortion, padding. Label maps are
always resized with "nearest".
"""

import contextlib
from typing import Any

import numpy as np
from PIL import Image

from beit_jax.data import drawing, images
from beit_jax.data.examples import HostBatch, decode, label_map_name, read
from beit_jax.data.label_maps import decode_labels
from beit_jax.data.resize import RESAMPLE, resize_with_pillow
from beit_jax.data.sources import Example, Source
from beit_jax.errors import BadImage, UserError

IGNORE = 255  # of a label map as the loss and the metrics see it
MAX_ZERO = 200  # label maps of 0 only in which `check_not_only_255` looks for a 255


def to_classes(
  labels: np.ndarray, name: str, *, num_classes: int, reduce_zero_label: bool, ignore_label: int
) -> np.ndarray:
  """Turns the values stored in a label map into class numbers.

  Args:
    labels: integers [H, W], the stored values.
    name: names the label map in errors.
    num_classes: number of classes.
    reduce_zero_label: whether class c is stored as c + 1 and 0 means "other", which is ignored (ADE20K).
    ignore_label: a stored value to ignore, in addition to 255.

  Returns:
    uint8 [H, W] in [0, num_classes), or IGNORE.

  Raises:
    UserError: a stored value is not a class.
  """
  ignored: np.ndarray = (labels == IGNORE) | (labels == ignore_label)
  classes: np.ndarray = labels.astype(np.int64 if labels.dtype.itemsize > 2 else np.int32)
  if reduce_zero_label:
    ignored |= labels == 0
    classes = classes - 1
  wrong = ~ignored & ((classes < 0) | (classes >= num_classes))
  if wrong.any():
    value = int(labels[wrong].max())  # as stored
    hint = "set data.num_classes, segment.ignore_label or segment.reduce_zero_label"
    if num_classes == 150:
      hint = (
        "ADE20K exists as SceneParse150 (ADEChallengeData2016, values 0 to 150), which is needed here, and as the full "
        "data set with thousands of classes"
      )
    raise UserError(
      f"{name}: the label map has the value {value}, but there are {num_classes} classes; {hint}"
    )
  return np.where(ignored, IGNORE, classes).astype(np.uint8)


def rescale_size(size: tuple[int, int], scale: tuple[float, float]) -> tuple[int, int]:
  """Scales (width, height) to fit in `scale` = (long, short); keeps the aspect ratio (mmcv.rescale_size)."""
  factor = min(max(scale) / max(size), min(scale) / min(size))
  width, height = (max(int(side * factor + 0.5), 1) for side in size)
  return width, height


def crop_box(
  rng: np.random.Generator, labels: np.ndarray, size: tuple[int, int], cat_max_ratio: float
) -> tuple[int, int, int, int]:
  """Draws a random crop, up to ten times while one class fills too much of it.

  Args:
    rng: draws the position.
    labels: [H, W].
    size: (height, width) of the crop; a smaller image limits it.
    cat_max_ratio: share of the labeled pixels that one class must stay below.

  Returns:
    (top, left, height, width).
  """
  height, width = (min(side, limit) for side, limit in zip(labels.shape, size, strict=True))
  for _ in range(10):
    top = int(rng.integers(labels.shape[0] - height + 1))
    left = int(rng.integers(labels.shape[1] - width + 1))
    values, counts = np.unique(labels[top : top + height, left : left + width], return_counts=True)
    counts = counts[values != IGNORE]
    if cat_max_ratio >= 1 or (len(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio):
      break
  return top, left, height, width


def distort(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
  """Applies mmseg's PhotoMetricDistortion: brightness, contrast, saturation, hue, each with probability 1/2.

  Args:
    rng: draws the operations and their strength.
    image: uint8 [H, W, 3].

  Returns:
    uint8 [H, W, 3].
  """

  def convert(x: np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
    return np.clip(x * alpha + beta, 0, 255).astype(np.uint8)

  def contrast(x: np.ndarray) -> np.ndarray:
    return convert(x, alpha=rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else x

  if rng.random() < 0.5:
    image = convert(image.astype(np.float32), beta=rng.uniform(-32, 32))
  first = rng.random() < 0.5
  image = contrast(image.astype(np.float32)).astype(np.uint8) if first else image
  if rng.random() < 0.5:
    image = _hsv(image, saturation=rng.uniform(0.5, 1.5))
  if rng.random() < 0.5:
    image = _hsv(image, hue=rng.integers(-18, 19) / 180)
  return image if first else contrast(image.astype(np.float32)).astype(np.uint8)


def _hsv(image: np.ndarray, saturation: float = 1.0, hue: float = 0.0) -> np.ndarray:
  """Changes saturation by a factor and shifts the hue by a fraction of the color circle."""
  hsv = np.asarray(Image.fromarray(image).convert("HSV")).astype(np.float32)
  hsv[..., 0] = (hsv[..., 0] + 255 * hue) % 256
  hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 255)
  return np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"))


class LabelMapReader:
  """Turns an example into a crop and its label map: the reader of the `segment` objective (see `examples.Reader`).

  Args:
    size: (height, width) of the crops.
    num_classes: number of classes.
    data: the config's `data` section.
    segment: the config's `segment` section.
  """

  def __init__(self, size: tuple[int, int], num_classes: int, data: dict[str, Any], segment: dict[str, Any]):
    self._size, self._data, self._segment = size, data, segment
    if data["interpolation"] not in RESAMPLE:
      raise UserError(
        f"config key 'data.interpolation': {data['interpolation']!r} is unknown; there are {', '.join(RESAMPLE)}"
      )
    self._rule = {name: segment[name] for name in ("reduce_zero_label", "ignore_label")}
    self._rule["num_classes"] = num_classes
    self._colors = drawing.as_colors(segment["palette"]) if segment.get("label_colors") else None
    self._fill = tuple(int(255 * m + 0.5) for m in data["mean"])

  def labels(self, example: Example, image: images.LazyImage, index: int) -> np.ndarray:
    """Decodes the label map of an example.

    Returns:
      uint8 [H, W], of the image's size.

    Raises:
      BadImage: the label map cannot be decoded; names the file.
      UserError: its size is not the image's, or a value is not a class; names the file.
    """
    name = label_map_name(example, index)
    return to_classes(self.stored(example, index, image.size), name, **self._rule)

  def stored(self, example: Example, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes the values stored in a label map; those of colors are their positions in the palette."""
    name = label_map_name(example, index)
    if example.get("label_map") is None:
      raise UserError(f"{name}: no label map; this objective needs one for every image (data.label_key)")
    return decode_labels(example["label_map"], name, size=size, colors=self._colors)

  def _labelled(self, example: Example, image: images.LazyImage, index: int) -> np.ndarray:
    """`labels`; raises `BadImage` if no pixel has a class, since such a map teaches nothing."""
    labels = self.labels(example, image, index)
    if (labels == IGNORE).all():
      raise BadImage(
        f"{label_map_name(example, index)}: no pixel of the label map has a class (255, segment.ignore_label and, with "
        "segment.reduce_zero_label, 0 are ignored)"
      )
    return labels

  def train(self, image: images.LazyImage, example: Example, key: tuple[int, ...]) -> HostBatch:
    rng, s = np.random.default_rng((*key, 2)), self._segment
    labels = self._labelled(example, image, example.get("index", key[-1]))
    factor = rng.uniform(*s["resize_ratio"])
    size = rescale_size(image.size, tuple(side * factor for side in s["resize"]))
    pixels, labels = self._resize(image, labels, size)
    top, left, height, width = crop_box(rng, labels, self._size, s["cat_max_ratio"])
    part = np.s_[top : top + height, left : left + width]
    pixels, labels = pixels[part], labels[part]
    if self._data["flip"] and rng.random() < 0.5:
      pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    if s["photometric"] and pixels.shape[2] == 3:
      pixels = distort(rng, np.ascontiguousarray(pixels))
    return self._pad(pixels, labels)

  def eval(self, image: images.LazyImage, example: Example) -> HostBatch:
    """Crops the center after the resize of evaluation. For figures; `objectives/sliding.py` evaluates full images."""
    labels = self._labelled(example, image, example.get("index", 0))
    size = rescale_size(image.size, self._segment["resize"])
    pixels, labels = self._resize(image, labels, size)
    top, left = (max((side - limit) // 2, 0) for side, limit in zip(labels.shape, self._size, strict=True))
    part = np.s_[top : top + self._size[0], left : left + self._size[1]]
    return self._pad(pixels[part], labels[part])

  def _resize(
    self, image: images.LazyImage, labels: np.ndarray, size: tuple[int, int]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Resizes both to (width, height)."""
    pixels = resize_with_pillow(image.pixels(), size[::-1], self._data["interpolation"])
    return pixels, np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))

  def _pad(self, pixels: np.ndarray, labels: np.ndarray) -> HostBatch:
    """Pads at the right and at the bottom, with the mean color and labels that are ignored."""
    image = np.empty((*self._size, len(self._fill)), np.uint8)
    image[:] = self._fill
    padded = np.full(self._size, IGNORE, np.uint8)
    image[: pixels.shape[0], : pixels.shape[1]] = pixels
    padded[: labels.shape[0], : labels.shape[1]] = labels
    return {"image": image, "label_map": padded}


def check_not_only_255(source: Source, reader: LabelMapReader) -> None:
  """Finds sets whose objects are stored as 255, which is ignored.

  Reads label maps up to the first that holds another value than 0 and 255: in a good set one or a few. It also stops if
  the first `MAX_ZERO` maps hold only 0.

  Raises:
    UserError: all label maps hold only 0 and 255.
  """
  found: set[int] = set()
  for index in range(len(source)):
    with contextlib.suppress(BadImage):
      found.update(np.unique(reader.stored(read(source, index), index)).tolist())
    if found - {0, IGNORE} or (index >= MAX_ZERO and IGNORE not in found):
      return
  if IGNORE in found:
    raise UserError(
      f"{source.description}: all {len(source)} label maps hold only the values {sorted(found)}, and 255 is ignored, "
      "so that at most one class is left. If 255 is a class, store it as 1, or set segment.label_colors=true, "
      "segment.palette=((0,0,0),(255,255,255)) and data.num_classes=2"
    )


def read_full_size(source: Source, reader: LabelMapReader, index: int) -> tuple[np.ndarray, np.ndarray]:
  """Reads an example without resizing: image uint8 [H, W, C] and label map uint8 [H, W].

  Raises:
    BadImage: one of the two cannot be read.
  """
  example = read(source, index)
  image = decode(example, index, source.pixel_rule)
  return image.pixels(), reader.labels(example, image, index)
