"""Segments whole images of any size: resize, predict in windows, average, resize back to the size of the image.

Follows mmseg's EncoderDecoder.slide_inference. Evaluation and `predict` share it. Images of any number of sizes need
only a handful of compiled programs: images are sorted by size into a few buckets and padded to the largest size of
theirs, and the places of windows and the resizing are data (offsets, weights), not shapes.

Shapes: B = batch size; H, W = image; h, w = the canvas that it is resized into; K = windows; C = classes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import augment
from beit_jax.data import segmentation
from beit_jax.data.resize import resize_with_pillow
from beit_jax.models.resampling import resize_bilinear

MODES = ("slide", "whole")
STRIP_VALUES = 2**24  # numbers in a strip of rows in `class_map`: 64 MiB
Size = tuple[int, int]  # (height, width)
Variables = dict[str, Any]
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Shapes that fit every image of a bucket, and so need one compiled program.

  Attributes:
    canvas: (h, w); resized images lie in its upper left corner.
    num_windows: K. Images with fewer windows do not take longer for it.
    shape: (H, W) of the output.
    scale: factor of `Sliding.resize`.
  """

  canvas: Size
  num_windows: int
  shape: Size
  scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Sliding:
  """A segmenter, and how it is applied to whole images.

  Attributes:
    module: image [B, *image_size, 3] -> {"logits": [B, ., ., C]}.
    image_size: size of a window.
    stride: distance between windows, (down, right).
    resize: (long, short); images are resized to fit in it.
    mode: "slide", or "whole" (the image is squashed to one window).
    mean: of pixels, as in `Pretrained.preprocessing`; likewise std and interpolation.
    std: see mean.
    interpolation: see mean.
  """

  module: Any
  image_size: Size
  stride: Size
  resize: tuple[float, float]
  mode: str
  mean: tuple[float, ...]
  std: tuple[float, ...]
  interpolation: str

  def describe(self) -> dict[str, Any]:
    """The entry `sliding` of a checkpoint's `preprocessing`."""
    return dict(mode=self.mode, resize=self.resize, stride=self.stride)

  def resized(self, size: Size, scale: float = 1.0) -> Size:
    """The size to which an image is resized. With sliding windows no side is shorter than a window."""
    if self.mode == "whole":
      return self.image_size
    width, height = segmentation.rescale_size(size[::-1], (scale * self.resize[0], scale * self.resize[1]))
    if min(height, width) < min(self.image_size):
      factor = max(self.image_size[0] / height, self.image_size[1] / width)
      height, width = math.ceil(height * factor), math.ceil(width * factor)
    return height, width

  def windows(self, size: Size) -> list[tuple[int, int, int, int]]:
    """The windows over an image that has been resized to `size`; see `windows`."""
    return windows(size, self.image_size, self.stride)

  def geometry(self, sizes: Sequence[Size], scale: float = 1.0) -> Geometry:
    """The shapes that fit all images of these sizes (before resizing)."""
    resized = [self.resized(size, scale) for size in sizes]
    canvas = np.maximum(np.max(resized, 0), self.image_size).tolist()
    num_windows = max(len(self.windows(size)) for size in resized)
    height, width = np.max(sizes, 0).tolist()
    return Geometry((canvas[0], canvas[1]), num_windows, (height, width), scale)

  def inputs(self, image: np.ndarray, geometry: Geometry, flip: bool = False) -> dict[str, np.ndarray]:
    """Prepares an image on the host: its row of a batch for `probabilities` and `class_map`.

    Args:
      image: uint8 [H, W, C].
      geometry: the shapes of its bucket.
      flip: predict the mirrored image, and mirror the result back.

    Returns:
      The padded image; corners and weights of the windows (weight 0: no window); and the place in the canvas of each
      row and column of the output.

    Raises:
      ValueError: the image does not fit the geometry.
    """
    height, width = size = self.resized((image.shape[0], image.shape[1]), geometry.scale)
    places = self.windows(size)
    available = (*geometry.canvas, *geometry.shape, geometry.num_windows)
    if any(np.less(available, (height, width, *image.shape[:2], len(places)))):
      raise ValueError(f"an image of {image.shape[:2]} (height, width) does not fit {geometry}")
    pixels = resize_with_pillow(image, size, self.interpolation)
    padded = np.empty((*geometry.canvas, len(self.mean)), np.uint8)
    padded[:] = [int(255 * m + 0.5) for m in self.mean]
    padded[:height, :width] = pixels[:, ::-1] if flip else pixels
    corners = np.zeros((geometry.num_windows, 2), np.int32)
    weight = np.zeros(geometry.num_windows, np.float32)
    for i, (top, _, left, _) in enumerate(places):
      corners[i], weight[i] = (top, left), 1.0
    rows, rows_weight = resize_points(height, image.shape[0], length=geometry.shape[0])
    columns, columns_weight = resize_points(width, image.shape[1], length=geometry.shape[1], flip=flip)
    return dict(
      image=padded,
      corners=corners,
      weight=weight,
      rows=rows,
      rows_weight=rows_weight,
      columns=columns,
      columns_weight=columns_weight,
    )

  def normalize(self, pixels: jax.Array) -> jax.Array:
    """uint8 pixels -> float32 input of the module."""
    return augment.normalize(augment.to_float(pixels), self.mean, self.std)

  def _mean_logits(self, variables: Variables, batch: Batch) -> jax.Array:
    """float32 [B, h, w, C]: the logits of the windows, averaged where they overlap."""
    image, crop = batch["image"], self.image_size

    def cut(x: jax.Array, corner: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice(x, (corner[0], corner[1], 0), (*crop, x.shape[-1]))

    def logits_at(corners: jax.Array) -> jax.Array:
      pixels = self.normalize(jax.vmap(cut)(image, corners))
      return resize_bilinear(self.module.apply(variables, pixels)["logits"], crop)

    def add_window(total: jax.Array, logits: jax.Array, corner: jax.Array, weight: jax.Array) -> jax.Array:
      value = jnp.concatenate([logits, jnp.ones((*crop, 1))], -1) * weight
      return jax.lax.dynamic_update_slice(total, cut(total, corner) + value, (corner[0], corner[1], 0))

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
      corners = batch["corners"][:, i]
      return jax.vmap(add_window)(total, logits_at(corners), corners, batch["weight"][:, i])

    classes = jax.eval_shape(logits_at, batch["corners"][:, 0]).shape[-1]
    count = (batch["weight"] > 0).sum(1).max()
    total = jax.lax.fori_loop(0, count, add, jnp.zeros((*image.shape[:3], classes + 1)))
    return total[..., :-1] / jnp.maximum(total[..., -1:], 1.0)

  @functools.cached_property
  def probabilities(self) -> Callable[[Variables, Batch], jax.Array]:
    """Jitted: (variables, batch of `inputs`) -> softmax at the size of the image, float32 [B, H, W, C]."""

    def run(variables: Variables, batch: Batch) -> jax.Array:
      mean = self._mean_logits(variables, batch)
      mean = _between(mean, batch["rows"], batch["rows_weight"], axis=1)
      return jax.nn.softmax(_between(mean, batch["columns"], batch["columns_weight"], axis=2))

    return jax.jit(run)

  @functools.cached_property
  def class_map(self) -> Callable[[Variables, Batch], jax.Array]:
    """Jitted: (variables, batch of `inputs`) -> the most probable class, uint8 [B, H, W].

    Works in strips of rows, so that no array [B, H, W, C] is allocated.
    """

    def run(variables: Variables, batch: Batch) -> jax.Array:
      mean = self._mean_logits(variables, batch)
      (size, height), width = batch["rows"].shape, batch["columns"].shape[1]
      strip = min(max(STRIP_VALUES // (size * width * mean.shape[-1]), 1), height)

      def in_strips(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -height % strip))).reshape(size, -1, strip).swapaxes(0, 1)

      def classes(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        part = _between(mean, *rows, axis=1)
        return _between(part, batch["columns"], batch["columns_weight"], axis=2).argmax(-1).astype(jnp.uint8)

      strips = jax.lax.map(classes, (in_strips(batch["rows"]), in_strips(batch["rows_weight"])))
      return strips.swapaxes(0, 1).reshape(size, -1, width)[:, :height]

    return jax.jit(run)


def _between(x: jax.Array, index: jax.Array, weight: jax.Array, *, axis: int) -> jax.Array:
  """Linear interpolation of [B, ...] along an axis, between `index` (int32 [B, N]) and the next."""

  def one(x: jax.Array, index: jax.Array, weight: jax.Array) -> jax.Array:
    ends = [jnp.take(x, i, axis - 1, mode="clip") for i in (index, index + 1)]
    weight = jnp.expand_dims(weight, tuple(range(1, x.ndim - axis + 1)))
    return ends[0] * (1 - weight) + ends[1] * weight

  return jax.vmap(one)(x, index, weight)


def windows(size: Size, crop: Size, stride: Size) -> list[tuple[int, int, int, int]]:
  """Lists the windows over an image row by row, as (top, bottom, left, right).

  The last row and column are moved back inside. An image smaller than the crop is one window of its own size.
  """
  counts = [max(side - c + s - 1, 0) // s + 1 for side, c, s in zip(size, crop, stride, strict=True)]

  def edges(i: int, axis: int) -> tuple[int, int]:
    stop = min(i * stride[axis] + crop[axis], size[axis])
    return max(stop - crop[axis], 0), stop

  return [(*edges(row, 0), *edges(column, 1)) for row in range(counts[0]) for column in range(counts[1])]


def resize_points(
  source: int, target: int, *, length: int, flip: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """The places of `target` samples among `source` ones, as in F.interpolate with align_corners=False.

  Sample i is x[index[i]] * (1 - weight[i]) + x[index[i] + 1] * weight[i]; the weight is 0 if there is no next one.

  Args:
    source: number of samples there are.
    target: number of samples wanted.
    length: the results are padded with 0 to this length.
    flip: read the source backwards.

  Returns:
    (index int32, weight float32 in [0, 1]), each [length].
  """
  position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
  position = source - 1 - position if flip else position
  lower = np.minimum(np.floor(position), max(source - 2, 0))
  index, weight = np.zeros(length, np.int32), np.zeros(length, np.float32)
  index[:target], weight[:target] = lower, position - lower
  return index, weight


def buckets(sizes: Sequence[Size], count: int) -> list[np.ndarray]:
  """Indices of images, sorted by size and divided into at most `count` groups of about equal length."""
  order = np.array(sorted(range(len(sizes)), key=lambda i: (tuple(sizes[i]), i)))
  return [part for part in np.array_split(order, max(min(count, len(order)), 1)) if len(part)]
