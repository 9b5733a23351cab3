"""Semantic segmentation of images of any size: class maps, and overlays to look at."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from beit_jax.data import drawing
from beit_jax.data.image_files import check_aspect, read_image
from beit_jax.data.pixels import RGB, PixelRule
from beit_jax.errors import UserError
from beit_jax.objectives.sliding import MODES, Geometry, Size, Sliding, buckets
from beit_jax.predict.batches import Facts, save, skipping
from beit_jax.runtime.logs import log
from beit_jax.weights.pretrained import Pretrained

BUCKETS = (
  4  # groups of image sizes; a program is compiled for each, or more where sizes in a group differ much
)
MAX_ASPECT = 16  # the short side becomes as long as a window: a narrower image would fill the memory
OVERLAY_SIDE = (320, 2048)  # range of an overlay's long side in pixels; images outside it are resized
MAX_SIDE = 2**15  # largest window stride and image size that a checkpoint may ask for
OUTPUTS = ("overlay", "class_map")


def segment(model: Pretrained, files: list[Path], args: argparse.Namespace) -> Iterator[Facts]:
  """Assigns a class to every pixel.

  The facts of an image are "size", [height, width] of the image and of its class map; "classes", those that occur with
  their share of the pixels, the largest first; "overlay", the path of an image with class colors and a legend; and
  "class_map", that of an 8-bit palette PNG whose values are class numbers. Each file is read twice, first for its size,
  so that memory holds one image at a time.

  Raises:
    UserError: the model has more classes than 8 bits can hold, or something cannot be written.
  """
  names, colors, sliding = class_names(model), class_colors(model), make_sliding(model)
  if len(names) > drawing.IGNORED:
    raise UserError(f"{len(names)} classes: an 8-bit class map can hold at most {drawing.IGNORED}")
  outputs = output_names(files, args.out)
  results: list[Facts] = [{"file": str(file)} for file in files]
  sizes: dict[int, Size] = {}
  for i, file in enumerate(files):
    with skipping(results[i]):
      height, width, _ = read(file, sliding, model.pixel_rule).shape
      sizes[i] = height, width
  chosen = dict(zip(sizes, geometries(sliding, list(sizes.values())), strict=True))
  variables = jax.device_put({"params": model.params, **model.collections})
  for i, facts in enumerate(results):
    if i in chosen:
      with skipping(facts):  # the file may have changed since its size was read
        image = read(files[i], sliding, model.pixel_rule)
        batch = {name: jnp.asarray(array[None]) for name, array in sliding.inputs(image, chosen[i]).items()}
    if "error" not in facts:
      classes = np.asarray(sliding.class_map(variables, batch))[0, : image.shape[0], : image.shape[1]]
      facts |= {"size": list(classes.shape), "classes": _shares(classes, names)}
      drawn = draw_overlay(image, classes, facts["classes"], colors), draw_class_map(classes, colors)
      for output, result in zip(OUTPUTS, drawn, strict=True):
        facts[output] = str(args.out / f"{output}s" / outputs[i])
        save(result, Path(facts[output]))
    yield facts


def make_sliding(model: Pretrained) -> Sliding:
  """Sets up the sliding windows of a loaded segmenter: as in the evaluation of its run.

  A checkpoint that does not describe them gets those of the released models: the image's short side is resized to the
  window, and the stride is two thirds of a window.

  Raises:
    UserError: the checkpoint's description is invalid.
  """
  preprocessing, size = model.preprocessing, tuple(model.preprocessing["image_size"])
  two_thirds = [max(2 * side // 3, 1) for side in size]
  default = {"stride": two_thirds, "resize": [4 * min(size), min(size)], "mode": "slide"}
  described = preprocessing.get("sliding") or {}
  try:
    rule = {**default, **described}
    stride, resize = ([int(side) for side in rule[key]] for key in ("stride", "resize"))
    valid = rule["mode"] in MODES and len(stride) == len(resize) == 2
    valid = valid and all(0 < side <= MAX_SIDE for side in (*stride, *resize))
  except (TypeError, ValueError, OverflowError):
    valid = False
  if not valid:
    raise UserError(
      f"the preprocessing of this checkpoint has sliding={described!r}; expected a value such as {default!r}"
    )
  return Sliding(
    module=model.module,
    image_size=size,
    stride=(stride[0], stride[1]),
    resize=(resize[0], resize[1]),
    mode=rule["mode"],
    mean=tuple(preprocessing["mean"]),
    std=tuple(preprocessing["std"]),
    interpolation=preprocessing["interpolation"],
  )


def class_names(model: Pretrained) -> list[str]:
  """Returns a name for each class of a segmenter; "class 3" if its checkpoint has none."""
  labels = list(model.description.get("labels") or ())
  names = [" ".join(str(label).split()) for label in labels[: model.module.num_classes]]
  return names + [f"class {i}" for i in range(len(names), model.module.num_classes)]


def class_colors(model: Pretrained) -> np.ndarray:
  """Returns the colors of the classes, uint8 [C, 3]: the checkpoint's, or generated ones."""
  count = model.module.num_classes
  try:
    return drawing.class_colors(model.description.get("palette") or (), count)
  except ValueError as error:
    log.warning("the checkpoint's palette is ignored: %s", error)
    return drawing.palette(count)


def geometries(sliding: Sliding, sizes: Sequence[Size]) -> list[Geometry]:
  """Chooses a geometry for each image size (H, W).

  Few of them differ, since a program is compiled for each, and no canvas is more than twice as large as its largest
  image needs.
  """
  result: dict[int, Geometry] = {}
  groups = [group.tolist() for group in buckets(sizes, BUCKETS)]
  while groups:
    group = groups.pop()
    shared = sliding.geometry([sizes[i] for i in group])
    largest = max(np.prod(sliding.geometry([sizes[i]]).canvas) for i in group)
    if np.prod(shared.canvas) > 2 * largest:  # wide and tall images in one group
      groups += [group[: len(group) // 2], group[len(group) // 2 :]]
    else:
      result |= dict.fromkeys(group, shared)
  return [result[i] for i in range(len(sizes))]


def read(path: Path, sliding: Sliding, rule: PixelRule = RGB) -> np.ndarray:
  """`read_image`, which also refuses images whose canvas would fill the memory."""
  image = read_image(path, rule)
  if sliding.mode == "slide":
    check_aspect(image.shape[1], image.shape[0], MAX_ASPECT)
  return image


def output_names(files: list[Path], folder: Path) -> list[Path]:
  """Chooses a unique NAME.png for each file; sub-folders below the files' common folder are kept.

  Raises:
    UserError: an output would overwrite one of the files.
  """
  inputs = [Path(os.path.abspath(file)) for file in files]
  base = os.path.commonpath([path.parent for path in inputs])
  names: dict[Path, None] = {}
  for path in inputs:
    stem, number = path.relative_to(base).with_suffix(""), 1
    name = stem.with_name(f"{stem.name}.png")
    while name in names:
      number += 1
      name = stem.with_name(f"{stem.name}_{number}.png")
    names[name] = None
  for output in OUTPUTS:
    written = {Path(os.path.abspath(folder / f"{output}s" / name)) for name in names}
    for path in written.intersection(inputs):
      raise UserError(f"--out={folder}: would overwrite the image {path}; use another folder")
  return list(names)


def _shares(classes: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
  counts = np.bincount(classes.ravel(), minlength=len(names))
  order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
  return [{"class": i, "label": names[i], "share": int(counts[i]) / classes.size} for i in order]


def draw_class_map(classes: np.ndarray, colors: np.ndarray) -> Image.Image:
  """Converts class numbers uint8 [H, W] to a palette image with the same values; colors: uint8 [C, 3]."""
  image = Image.fromarray(np.ascontiguousarray(classes))
  # With a palette of fewer colors, Pillow would save fewer than 8 bits.
  image.putpalette(np.pad(colors, ((0, 256 - len(colors)), (0, 0))).tobytes())
  return image


def draw_overlay(
  image: np.ndarray, classes: np.ndarray, shares: list[Facts], colors: np.ndarray
) -> Image.Image:
  """Blends class colors over an image uint8 [H, W, C] and adds a legend of the classes in `shares`."""
  side, (smallest, largest) = max(classes.shape), OVERLAY_SIDE
  factor = -(-smallest // side) if side < smallest else min(largest / side, 1)
  height, width = (max(round(n * factor), 1) for n in classes.shape)
  resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
  pixels = (
    np.asarray(Image.fromarray(drawing.visible(image)).resize((width, height), resample), np.float32) / 255
  )
  class_image = Image.fromarray(np.ascontiguousarray(classes))
  areas = np.asarray(class_image.resize((width, height), Image.Resampling.NEAREST))
  mixed = drawing.overlay(pixels, areas, colors)
  entries = [(colors[entry["class"]], f"{entry['share']:.1%} {entry['label']}") for entry in shares]
  return Image.fromarray(drawing.add_legend((mixed * 255).round().astype(np.uint8), entries))
