"""A segmenter over whole pictures of any size: resized, seen through windows, averaged, resized to the picture's size.

Follows mmseg's EncoderDecoder.slide_inference. Pure: a function of module, variables and pixels; evaluation and
`predict` share it. Letters: B batch, H W picture, h w the canvas it is resized into, K windows, C classes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import augment
from beit_jax.data import segmentation
from beit_jax.models.resampling import resize_bilinear

MODES = ("slide", "whole")
STRIP = 2**24  # values of a strip of rows in `class_map`: 64 MiB
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Shapes that fit every picture of a bucket: one compiled program.

  Attributes:
    canvas: (h, w) in which resized pictures lie, in the upper left corner.
    count: K; a picture with fewer windows is not the slower for it.
    shape: (H, W) of what comes out.
    scale: factor of the resize rule.
  """

  canvas: Size
  count: int
  shape: Size
  scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Sliding:
  """How a segmenter sees pictures.

  Attributes:
    module: image [B, *image_size, 3] -> {"logits": [B, ., ., C]}.
    image_size: (height, width) of a window.
    stride: (down, right) between windows.
    resize: (long, short) that a picture is resized to fit in.
    mode: "slide", or "whole": squashed to one window.
    mean, std, interpolation: of the pixels, as in `Pretrained.preprocessing`.
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
    """What a checkpoint's `preprocessing` says of it besides mean, std, image_size and interpolation."""
    return dict(mode=self.mode, resize=self.resize, stride=self.stride)

  def resized(self, size: Size, scale: float = 1.0) -> Size:
    """(H, W) of a picture -> (height, width) at which it is seen; where it slides, no side too short for a window."""
    if self.mode == "whole":
      return self.image_size
    width, height = segmentation.rescale_size(size[::-1], tuple(scale * side for side in self.resize))
    if min(height, width) < min(self.image_size):
      short = max(side / have for side, have in zip(self.image_size, (height, width), strict=True))
      height, width = (math.ceil(side * short) for side in (height, width))
    return height, width

  def windows(self, size: Size) -> list[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of the windows over a picture that has been resized to `size`."""
    return windows(size, self.image_size, self.stride)

  def geometry(self, sizes: Sequence[Size], scale: float = 1.0) -> Geometry:
    """Fits all pictures of these sizes, (H, W) each, as they are before they are resized."""
    resized = [self.resized(size, scale) for size in sizes]
    height, width = np.maximum(np.max(resized, 0), self.image_size).tolist()
    count = max(len(self.windows(size)) for size in resized)
    return Geometry((height, width), count, tuple(np.max(sizes, 0).tolist()), scale)

  def inputs(self, image: np.ndarray, geometry: Geometry, flip: bool = False) -> dict[str, np.ndarray]:
    """Host side: a picture uint8 [H, W, 3] -> its row of the batches below.

    Padded pixels, the windows' corners and weights (0: no window), and where each row and column of the picture lies
    in the canvas. With `flip` the mirrored picture is seen, and what comes out is turned back.

    Raises:
      ValueError: the picture does not fit the geometry.
    """
    height, width = size = self.resized(image.shape[:2], geometry.scale)
    places = self.windows(size)
    room = (*geometry.canvas, *geometry.shape, geometry.count)
    if any(np.less(room, (height, width, *image.shape[:2], len(places)))):
      raise ValueError(f"a picture of {image.shape[:2]} (height, width) does not fit {geometry}")
    pixels = segmentation.resize_image(image, size, self.interpolation)
    padded = np.empty((*geometry.canvas, 3), np.uint8)
    padded[:] = [int(255 * m + 0.5) for m in self.mean]
    padded[:height, :width] = pixels[:, ::-1] if flip else pixels
    corners, weight = np.zeros((geometry.count, 2), np.int32), np.zeros(geometry.count, np.float32)
    for i, (top, _, left, _) in enumerate(places):
      corners[i], weight[i] = (top, left), 1.0
    below, below_weight = resize_points(height, image.shape[0], length=geometry.shape[0])
    right, right_weight = resize_points(width, image.shape[1], length=geometry.shape[1], flip=flip)
    return dict(
      image=padded,
      corners=corners,
      weight=weight,
      rows=below,
      rows_weight=below_weight,
      columns=right,
      columns_weight=right_weight,
    )

  def normalize(self, pixels: jax.Array) -> jax.Array:
    """uint8 -> what the module sees, float32."""
    return augment.normalize(augment.to_float(pixels), self.mean, self.std)

  def _mean_logits(self, variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """float32 [B, h, w, C]: the windows' logits, averaged where windows overlap."""
    image, crop = batch["image"], self.image_size
    cut = lambda x, at: jax.lax.dynamic_slice(x, (at[0], at[1], 0), (*crop, x.shape[-1]))

    def logits_at(corners):
      pixels = self.normalize(jax.vmap(cut)(image, corners))
      return resize_bilinear(self.module.apply(variables, pixels)["logits"], crop)

    def put(total, logits, at, weight):
      value = jnp.concatenate([logits, jnp.ones((*crop, 1))], -1) * weight
      return jax.lax.dynamic_update_slice(total, cut(total, at) + value, (at[0], at[1], 0))

    def add(i, total):
      corners = batch["corners"][:, i]
      return jax.vmap(put)(total, logits_at(corners), corners, batch["weight"][:, i])

    classes = jax.eval_shape(logits_at, batch["corners"][:, 0]).shape[-1]
    count = (batch["weight"] > 0).sum(1).max()
    total = jax.lax.fori_loop(0, count, add, jnp.zeros((*image.shape[:3], classes + 1)))
    return total[..., :-1] / jnp.maximum(total[..., -1:], 1.0)

  @functools.cached_property
  def probabilities(self):
    """Jitted: (variables, batch) -> float32 [B, H, W, C], softmax at the picture's size. batch: see `inputs`."""

    def run(variables, batch):
      mean = self._mean_logits(variables, batch)
      mean = _between(mean, batch["rows"], batch["rows_weight"], axis=1)
      return jax.nn.softmax(_between(mean, batch["columns"], batch["columns_weight"], axis=2))

    return jax.jit(run)

  @functools.cached_property
  def class_map(self):
    """Jitted: (variables, batch) -> uint8 [B, H, W], the likeliest class. In strips: no [B, H, W, C] is ever made."""

    def run(variables, batch):
      mean = self._mean_logits(variables, batch)
      (size, height), width = batch["rows"].shape, batch["columns"].shape[1]
      strip = min(max(STRIP // (size * width * mean.shape[-1]), 1), height)
      cut = lambda x: jnp.pad(x, ((0, 0), (0, -height % strip))).reshape(size, -1, strip).swapaxes(0, 1)

      def classes(rows):
        part = _between(mean, *rows, axis=1)
        return _between(part, batch["columns"], batch["columns_weight"], axis=2).argmax(-1).astype(jnp.uint8)

      strips = jax.lax.map(classes, (cut(batch["rows"]), cut(batch["rows_weight"])))
      return strips.swapaxes(0, 1).reshape(size, -1, width)[:, :height]

    return jax.jit(run)


def _between(x: jax.Array, index: jax.Array, weight: jax.Array, *, axis: int) -> jax.Array:
  """Linear interpolation of [B, ...] along an axis, between `index` and the next: int32, float32 [B, N]."""

  def one(x, index, weight):
    ends = [jnp.take(x, i, axis - 1, mode="clip") for i in (index, index + 1)]
    weight = jnp.expand_dims(weight, tuple(range(1, x.ndim - axis + 1)))
    return ends[0] * (1 - weight) + ends[1] * weight

  return jax.vmap(one)(x, index, weight)


def windows(
  size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
  """(top, bottom, left, right) of the windows over an image of (height, width), rows outermost.

  The last row and column are moved back inside; an image smaller than the crop is one window of its own size.
  """
  counts = [max(side - c + s - 1, 0) // s + 1 for side, c, s in zip(size, crop, stride, strict=True)]
  result = []
  for row in range(counts[0]):
    for column in range(counts[1]):
      edges = []
      for i, side, c, s in zip((row, column), size, crop, stride, strict=True):
        stop = min(i * s + c, side)
        edges += [max(stop - c, 0), stop]
      result.append(tuple(edges))
  return result


def resize_points(
  source: int, target: int, *, length: int, flip: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Where `target` samples lie among `source` ones (F.interpolate, align_corners=False), padded with 0 to `length`.

  Sample i is x[index[i]] * (1 - weight[i]) + x[index[i] + 1] * weight[i], where weight is 0 if there is no next one.
  `flip` reads the source backwards.

  Returns:
    (index int32, weight float32 in [0, 1]), each [length].
  """
  position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
  position = source - 1 - position if flip else position
  lower = np.minimum(np.floor(position), max(source - 2, 0))
  index, weight = np.zeros(length, np.int32), np.zeros(length, np.float32)
  index[:target], weight[:target] = lower, position - lower
  return index, weight


def buckets(sizes: Sequence[tuple[int, int]], count: int) -> list[np.ndarray]:
  """Indices of the images, sorted by (height, width) and cut into at most `count` groups of about equal length."""
  order = np.array(sorted(range(len(sizes)), key=lambda i: (tuple(sizes[i]), i)))
  return [part for part in np.array_split(order, max(min(count, len(order)), 1)) if len(part)]
