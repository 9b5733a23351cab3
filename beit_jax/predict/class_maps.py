"""What `predict` does with a segmenter: a class for every pixel of pictures of any size."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from beit_jax.data import drawing
from beit_jax.data.image_files import read_image
from beit_jax.errors import UserError
from beit_jax.objectives.sliding import MODES, Geometry, Size, Sliding
from beit_jax.runtime.logs import log
from beit_jax.weights.pretrained import Pretrained

BUCKETS = 4  # programs compiled, however many sizes there are
MAX_ASPECT = 16  # the short side is at least a window: a thinner picture would fill the memory
OVERLAY = (
  320,
  2048,
)  # pixels of an overlay's long side; small pictures are enlarged, large ones made smaller
MAX_SIDE = 2**15  # of what a checkpoint says of windows and sizes
Facts = dict[str, Any]


def sliding_of(model: Pretrained) -> Sliding:
  """How a loaded segmenter sees pictures: as its run evaluated it, or, where it does not say, as unilm's did.

  That is: windows of its image size two thirds apart, the picture's short side resized to a window's.

  Raises:
    UserError: what it says cannot be.
  """
  p, size = model.preprocessing, tuple(model.preprocessing["image_size"])
  usual = dict(
    stride=[max(2 * side // 3, 1) for side in size], resize=[4 * min(size), min(size)], mode="slide"
  )
  said = p.get("sliding") or {}
  try:
    said = {**usual, **said}
    stride, resize = ([int(n) for n in said[key]] for key in ("stride", "resize"))
    good = said["mode"] in MODES and len(stride) == len(resize) == 2 and 0 < min(*stride, *resize)
    good = good and max(*stride, *resize) <= MAX_SIDE
  except (TypeError, ValueError, OverflowError):
    good = False
  if not good:
    raise UserError(f"the preprocessing of this checkpoint has sliding={said!r}, expected such as {usual!r}")
  return Sliding(
    module=model.module,
    image_size=size,
    stride=tuple(stride),
    resize=tuple(resize),
    mode=said["mode"],
    mean=tuple(p["mean"]),
    std=tuple(p["std"]),
    interpolation=p["interpolation"],
  )


def class_names(model: Pretrained) -> list[str]:
  """A name for each class of a segmenter; "class 3" where its checkpoint has none."""
  names = list(model.description.get("labels") or ())
  return [
    " ".join(str(names[i]).split()) if i < len(names) else f"class {i}"
    for i in range(model.module.num_classes)
  ]


def colours(model: Pretrained) -> np.ndarray:
  """Its data set's colours, or made-up ones: uint8 [C, 3]."""
  count = model.module.num_classes
  try:
    return drawing.class_colours(model.description.get("palette") or (), count)
  except ValueError as error:
    log.warning("the checkpoint's palette is not used: %s", error)
    return drawing.palette(count)


def geometries(sliding: Sliding, sizes: Sequence[Size]) -> list[Geometry]:
  """One for each picture of (H, W); few different ones, and none far larger than its pictures need."""
  result: list[Geometry] = [Geometry((0, 0), 0, (0, 0))] * len(sizes)
  parts = [list(map(int, part)) for part in sliding.buckets(sizes, BUCKETS)]
  while parts:
    part = parts.pop()
    found = sliding.geometry([sizes[i] for i in part])
    largest = max(np.prod(sliding.geometry([sizes[i]]).canvas) for i in part)
    if np.prod(found.canvas) > 2 * largest:  # broad and tall ones together
      parts += [part[: len(part) // 2], part[len(part) // 2 :]]
      continue
    for i in part:
      result[i] = found
  return result


def segment(model: Pretrained, files: list[Path], folder: Path) -> Iterator[Facts]:
  """Yields each file's facts, in order: "file", "size", "classes", "overlay" and "class_map", or "file" and "error".

  "size" is [height, width] of the picture and of its class map, an 8-bit palette PNG in folder/class_maps whose values
  are class numbers; "classes" are those that occur, the largest first, with their share of the pixels; the overlay is
  for looking at. Files are read twice, the first time for their sizes, one at a time.

  Raises:
    UserError: the model has more classes than a byte, or something cannot be written.
  """
  if model.module.num_classes > 255:
    raise UserError(
      f"{model.module.num_classes} classes: an 8-bit class map has values for 255, and one for none"
    )
  sliding, names, table = sliding_of(model), class_names(model), colours(model)
  outputs = output_names(files, folder)
  sizes = [_size(file, sliding) for file in files]
  shapes = iter(geometries(sliding, [size for size in sizes if not isinstance(size, str)]))
  if any(not isinstance(size, str) for size in sizes):
    with _writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
  variables = jax.device_put({"params": model.params, **model.collections})
  for file, name, size in zip(files, outputs, sizes, strict=True):
    facts: Facts = {"file": str(file)}
    if isinstance(size, str):
      yield {**facts, "error": size}
      continue
    geometry = next(shapes)
    try:
      image = read(file, sliding)
      batch = {key: x[None] for key, x in sliding.inputs(image, geometry).items()}
    except ValueError as error:  # it is not what it was a moment ago
      log.warning("skipped %s: %s", file, error)
      yield {**facts, "error": str(error)}
      continue
    classes = np.asarray(sliding.class_map(variables, batch))[0, : image.shape[0], : image.shape[1]]
    facts |= {"size": list(classes.shape), "classes": _shares(classes, names)}
    paths = {what: folder / f"{what}s" / name for what in ("overlay", "class_map")}
    with _writing(folder):
      for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
      draw(image, classes, facts["classes"], table).save(paths["overlay"])
      class_map_image(classes, table).save(paths["class_map"])
    yield {**facts, **{what: str(path) for what, path in paths.items()}}


def _size(file: Path, sliding: Sliding) -> Size | str:
  """(H, W) of a picture, or, said in the log too, why it cannot be read."""
  try:
    height, width, _ = read(file, sliding).shape
    return height, width
  except ValueError as error:
    log.warning("skipped %s: %s", file, error)
    return str(error)


def text(facts: Facts) -> str:
  """A picture's facts as lines of text."""
  lines = [f"  {entry['share']:7.2%}  {entry['label']}" for entry in facts["classes"]]
  return "\n".join([*lines, f"  overlay {facts['overlay']}, class map {facts['class_map']}"])


def read(path: Path, sliding: Sliding) -> np.ndarray:
  """`read_image`, with a ValueError also where the canvas would fill the memory."""
  image = read_image(path)
  height, width = image.shape[:2]
  if sliding.mode == "slide" and max(height, width) > MAX_ASPECT * min(height, width):
    raise ValueError(f"{width}x{height} pixels are too narrow a picture")
  return image


def output_names(files: list[Path], folder: Path) -> list[Path]:
  """NAME.png for each file, in the folders that the files are in below the one that all share; each name once.

  Raises:
    UserError: one of the files is where a class map or an overlay will be.
  """
  whole = [Path(os.path.abspath(file)) for file in files]
  base = os.path.commonpath([path.parent for path in whole])
  names: dict[Path, None] = {}
  for path in whole:
    relative, number = path.relative_to(base), 1
    name = relative.with_name(f"{relative.stem}.png")
    while name in names:
      number += 1
      name = relative.with_name(f"{relative.stem}_{number}.png")
    names[name] = None
  for path in whole:
    for what in ("overlays", "class_maps"):
      if path.is_relative_to(top := Path(os.path.abspath(folder / what))) and path.relative_to(top) in names:
        raise UserError(f"--out={folder}: would overwrite {path}, one of the pictures; give another folder")
  return list(names)


def _shares(classes: np.ndarray, names: list[str]) -> list[Facts]:
  counts = np.bincount(classes.ravel(), minlength=len(names))
  order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
  return [{"class": i, "label": names[i], "share": int(counts[i]) / classes.size} for i in order]


def class_map_image(classes: np.ndarray, table: np.ndarray) -> Image.Image:
  """uint8 [H, W] -> a palette image of these values. table: uint8 [C, 3]."""
  image = Image.fromarray(np.ascontiguousarray(classes))
  image.putpalette(
    np.pad(table, ((0, 256 - len(table)), (0, 0))).tobytes()
  )  # of fewer Pillow would save 4 bits
  return image


def draw(image: np.ndarray, classes: np.ndarray, found: list[Facts], table: np.ndarray) -> Image.Image:
  """The picture uint8 [H, W, 3] under the colours of its classes, and a legend of those `found` in it."""
  side, (small, large) = max(classes.shape), OVERLAY
  factor = -(-small // side) if side < small else min(large / side, 1)
  height, width = (max(round(n * factor), 1) for n in classes.shape)
  resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
  shown = np.asarray(Image.fromarray(image).resize((width, height), resample), np.float32) / 255
  areas = np.asarray(
    Image.fromarray(np.ascontiguousarray(classes)).resize((width, height), Image.Resampling.NEAREST)
  )
  mixed = drawing.overlay(shown, areas, table)
  entries = [(table[entry["class"]], f"{entry['share']:.1%} {entry['label']}") for entry in found]
  return Image.fromarray(drawing.legend((mixed * 255).round().astype(np.uint8), entries))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(
      f"--out: {error.filename or folder} cannot be written ({error.strerror or error})"
    ) from None
