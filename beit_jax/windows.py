"""Sliding windows over images of any size with a handful of compiled programs: host-side geometry and metrics.

Follows mmseg's EncoderDecoder.slide_inference and mean_iou. Images are sorted by size into a few buckets and padded to
the largest of theirs; where a window lies and how a picture is resized are data (offsets, weights), not shapes.
"""

from collections.abc import Sequence

import numpy as np


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


def mean_iou(intersection: np.ndarray, predicted: np.ndarray, labelled: np.ndarray) -> dict[str, np.ndarray]:
  """From pixel counts per class [C], summed over the whole set.

  Returns:
    IoU and Acc per class (NaN where a class is absent), their means over the classes that occur (mIoU, mAcc), and the
    accuracy over all pixels (aAcc).
  """
  with np.errstate(divide="ignore", invalid="ignore"):
    iou = intersection / (predicted + labelled - intersection)
    accuracy = intersection / labelled
  mean = lambda x: float(np.nanmean(x)) if np.isfinite(x).any() else float("nan")  # noqa: E731
  return {
    "IoU": iou,
    "Acc": accuracy,
    "mIoU": mean(iou),
    "mAcc": mean(accuracy),
    "aAcc": float(intersection.sum() / max(labelled.sum(), 1)),
  }
