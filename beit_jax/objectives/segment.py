"""Semantic segmentation: UPerNet or SETR-PUP on a BEiT encoder, trained on crops, evaluated by sliding windows.

Follows unilm `beit/semantic_segmentation` (mmseg 0.11). The loss is the mean over the pixels that have a class; mmseg
divides by the number of all pixels (docs/conflicts.md).
"""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from beit_jax import augment, losses, metrics
from beit_jax.config import ranges
from beit_jax.config.defaults import EitherOf, OptionalOf
from beit_jax.config.parse import pair
from beit_jax.data import drawing, segmentation
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.data.labels import check_order, listed
from beit_jax.data.sources import Source
from beit_jax.errors import BadImage, UserError
from beit_jax.models.resampling import resize_bilinear
from beit_jax.models.upernet import OUT_INDICES, BeitForSemanticSegmentation
from beit_jax.objectives import base, sliding
from beit_jax.objectives.base import Array, Batch, EvalOutput, Loader, LossOutput, Metric, PyTree, Variables
from beit_jax.objectives.encoder import EncoderObjective, encoder_fields, head_schema
from beit_jax.runtime import sharding
from beit_jax.runtime.logs import log
from beit_jax.weights import io as weights_io
from beit_jax.weights.pretrained import Pretrained


class Segmentation(EncoderObjective):
  """Cross-entropy of every pixel: that of the decode head plus the weighted one of the auxiliary heads."""

  kind = "segmenter"
  eval_metrics = ("mIoU", "mAcc", "aAcc")
  labels = "map"
  value_ranges = (
    (
      r"segment\.resize",
      ranges.tuple_of(2, ranges.number(1, 8192), "(long, short), two numbers from 1 to 8,192"),
    ),
    (
      r"segment\.resize_ratio",
      ranges.tuple_of(2, ranges.number(0.01, 10), "two numbers in [0.01, 10]", ascending=True),
    ),
    (r"segment\.cat_max_ratio", ranges.positive()),
    (r"segment\.aux_weight", ranges.number(0)),
    (r"segment\.mode", ranges.one_of(*sliding.MODES)),
    (r"segment\.stride", ranges.integer(1, 8192)),
    (r"segment\.scales", ranges.tuple_of(None, ranges.number(0.01, 10), "one or more numbers in [0.01, 10]")),
    (r"segment\.programs", ranges.integer(1, 1000)),
  )

  def __init__(self, config: ConfigDict, source: Source, load: Loader | None = None) -> None:
    super().__init__(config, source, load)
    options = config.segment
    self.num_classes = self.expected_outputs(config) or len(source.map_class_names)
    self.palette = options.palette or source.map_colors
    if not self.num_classes:
      raise UserError(
        "config key 'data.num_classes': label maps do not say how many classes there are; set it, or data.class_file"
      )
    if not 2 <= self.num_classes < segmentation.IGNORE:
      raise UserError(
        f"config key 'data.num_classes': {self.num_classes} must lie in [2, 254]; with one class every pixel is right "
        "whatever the model predicts, so the background counts as a class"
      )
    self.class_names, self.colors = _names_and_colors(options, self.palette, source, self.num_classes)
    self.module = self.make_module(config.model, self.image_size, self.num_classes)
    self.stride = pair(options.stride, "segment.stride") if options.stride else self.image_size
    if any(step > side for step, side in zip(self.stride, self.image_size, strict=True)):
      raise UserError(
        f"config key 'segment.stride': {options.stride} is larger than the windows of data.image_size="
        f"{self.image_size}; pixels between the windows would be left out"
      )
    self.sliding = sliding.Sliding(
      module=self.module,
      image_size=self.image_size,
      stride=self.stride,
      resize=tuple(options.resize),
      mode=options.mode,
      mean=tuple(config.data.mean),
      std=tuple(config.data.std),
      interpolation=config.data.interpolation,
    )

  @classmethod
  def config_section(cls) -> dict[str, Any]:
    # None and (): from the data, and from the encoder.
    own = {"num_classes": OptionalOf(int), "channels": OptionalOf(int), "out_indices": ()}
    return dict(
      model={**head_schema(BeitForSemanticSegmentation), **own},
      segment=dict(
        reduce_zero_label=False,  # 0 in the label map is no class, and class c is stored as c + 1 (ADE20K)
        ignore_label=255,  # this value is ignored, besides 255
        resize=(
          2048,
          512,
        ),  # (long, short): images are resized to fit in it, in training times a random factor
        resize_ratio=(0.5, 2.0),
        cat_max_ratio=0.75,  # no class fills more of a training crop, if ten tries can help it
        photometric=True,
        aux_weight=0.4,
        mode="slide",  # of evaluation: "slide" | "whole" (squashed to data.image_size)
        stride=OptionalOf(int),  # of the windows; None = no overlap
        scales=(1.0,),  # of evaluation: softmax averaged
        flip=False,  # of evaluation
        programs=8,  # at most so many are compiled for images of any number of sizes
        class_names=(),  # of all classes, in order; () = those of the data set
        palette=EitherOf((str, tuple), ()),  # "camvid", or (red, green, blue) of all classes; () = made up
        label_colors=False,  # label maps have the colors of the palette, whose positions are the stored values
      ),
    )

  @classmethod
  def make_module(
    cls, model: ConfigDict, image_size: tuple[int, int], outputs: int
  ) -> BeitForSemanticSegmentation:
    encoder = {**encoder_fields(model, image_size, pretrain=False), "weight_init": "finetune"}
    head = {
      name: model[name] for name in base.module_fields(BeitForSemanticSegmentation, without=("encoder",))
    }
    head["out_indices"] = tuple(model.out_indices) or _default_out_indices(encoder["depth"])
    return BeitForSemanticSegmentation(encoder, **{**head, "num_classes": outputs})

  @classmethod
  def expected_outputs(cls, config: ConfigDict) -> int:
    return config.model.num_classes or config.data.num_classes or 0

  def reader(self) -> Any:
    data, options = self.config.data.to_dict(), {**self.config.segment.to_dict(), "palette": self.palette}
    return segmentation.LabelMapReader(self.image_size, self.num_classes, data, options)

  def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    label_map = base.with_common_arrays({"label_map": (self.image_size, jnp.uint8)}, batch_size)
    return {**super().batch_shapes(batch_size), **label_map}

  def _image(self, pixels: Array) -> Array:
    return self.sliding.normalize(pixels)

  def loss(self, variables: Variables, frozen: PyTree, batch: Batch, key: Array, step: Array) -> LossOutput:
    del frozen, step
    rngs = {"drop_path": key, "dropout": jax.random.fold_in(key, 1)}
    out, collections = self.module.apply(
      variables, self._image(batch["image"]), train=True, rngs=rngs, mutable=["batch_stats"]
    )
    label = batch["label_map"]

    def entropy(logits: Array) -> tuple[Array, ...]:
      return losses.segmentation_cross_entropy(resize_bilinear(logits, self.image_size), label)

    total, count, correct = entropy(out["logits"])
    aux = out["aux"] if isinstance(out["aux"], tuple) else (out["aux"],)
    aux_total = sum(entropy(logits)[0] for logits in aux)
    sums = {
      "loss": Metric(total + self.config.segment.aux_weight * aux_total, count),
      "decode_loss": Metric(total, count),
      "pixel_acc": Metric(correct, count),
    }
    return LossOutput(sums, dict(collections))

  def eval_step(self, variables: Variables, frozen: PyTree, batch: Batch) -> EvalOutput:
    """Metrics of crops; `evaluate_images` gives those of whole images."""
    del frozen
    logits = resize_bilinear(
      self.module.apply(variables, self._image(batch["image"]))["logits"], self.image_size
    )
    label = jnp.where(batch["valid"][:, None, None], batch["label_map"], segmentation.IGNORE)
    total, count, correct = losses.segmentation_cross_entropy(logits, label)
    return EvalOutput({"loss": Metric(total, count), "pixel_acc": Metric(correct, count)})

  # Evaluation of whole images.

  def evaluate_images(self, variables: Any, source: Any, mesh: jax.sharding.Mesh) -> tuple[dict, dict]:
    """mIoU, mAcc and aAcc over images of any size, from histograms summed over the whole set.

    Returns:
      (metrics, rows per class: IoU, Acc, labelled pixels).

    Raises:
      UserError: more than data.max_bad of the images or label maps cannot be read; fewer are left out.
    """
    options = self.config.segment
    scales = tuple(options.scales)
    reader = self.reader()
    sizes = _sizes(source, reader, BadImageTracker(source, self.config.data.max_bad, shuffled=False))
    known, programs = np.array(list(sizes)), max(1, options.programs // (len(scales) + 1))
    histogram = np.zeros((3, self.num_classes), np.int64)
    # One program a bucket and scale, and one a bucket for the histogram: eight in all for one scale.
    for part in sliding.buckets(list(sizes.values()), programs):
      histogram += self._evaluate_bucket(variables, source, reader, known[part], sizes, scales, mesh)
    self._log_occurring(histogram[2] > 0, source)
    found = metrics.mean_iou(*histogram.astype(np.float64))
    rows = {"IoU": found.pop("IoU"), "Acc": found.pop("Acc"), "labelled": histogram[2]}
    return found, rows

  def _log_occurring(self, occurs: np.ndarray, source: Source) -> None:
    """Logs which classes the label maps lack; raises a UserError if they have none."""
    if not occurs.any():
      raise UserError(
        f"{source.description}: no pixel has a class (255, segment.ignore_label and, with segment.reduce_zero_label, 0 "
        "are ignored), so there is nothing to measure"
      )
    absent = [name for name, there in zip(self._names(), occurs, strict=True) if not there]
    text = f"; absent: {listed(absent)}" if absent else ""
    log.info("%d of %d classes occur in the label maps%s", occurs.sum(), len(occurs), text)

  def _names(self) -> tuple[str, ...]:
    return self.class_names or tuple(map(str, range(self.num_classes)))

  def _evaluate_bucket(
    self,
    variables: Variables,
    source: Source,
    reader: segmentation.LabelMapReader,
    indices: np.ndarray,
    sizes: dict[int, tuple[int, int]],
    scales: tuple[float, ...],
    mesh: jax.sharding.Mesh,
  ) -> np.ndarray:
    geometries = [self.sliding.geometry([sizes[i] for i in indices], scale) for scale in scales]
    flips = (False, True) if self.config.segment.flip else (False,)
    rows = sharding.local_rows(mesh, mesh.size)
    histogram = np.zeros((3, self.num_classes), np.int64)
    for start in range(0, len(indices), mesh.size):
      chosen = [int(indices[min(start + row, len(indices) - 1)]) for row in rows]
      real = [start + row < len(indices) for row in rows]
      examples = [segmentation.read_full_size(source, reader, i) for i in chosen]
      label = np.full((len(rows), *geometries[0].shape), segmentation.IGNORE, np.uint8)
      for place, (_, mine) in enumerate(examples):
        if real[place]:
          label[place, : mine.shape[0], : mine.shape[1]] = mine
      total = None
      for geometry in geometries:
        for flip in flips:
          inputs = [self.sliding.inputs(image, geometry, flip) for image, _ in examples]
          batch = {name: np.stack([x[name] for x in inputs]) for name in inputs[0]}
          scores = self.sliding.probabilities(variables, sharding.put_batch(mesh, batch, mesh.size))
          total = scores if total is None else total + scores
      counts = self._histogram(total, sharding.put_batch(mesh, {"label": label}, mesh.size)["label"])
      histogram += np.asarray(jax.device_get(counts), np.int64)
    return histogram

  @functools.cached_property
  def _histogram(self) -> Any:
    """(scores [B, H, W, C], labels [B, H, W]) -> int32 [3, C]: valid pixels that are right, predicted, labelled."""

    def run(scores: Array, label: Array) -> Array:
      classes = jnp.arange(self.num_classes)
      guess = jnp.where(label == segmentation.IGNORE, segmentation.IGNORE, scores.argmax(-1))
      guess, label = guess[..., None] == classes, label[..., None] == classes
      counts = jnp.stack([x.sum((0, 1, 2), dtype=jnp.int32) for x in (guess & label, guess, label)])
      return jax.lax.with_sharding_constraint(counts, jax.sharding.PartitionSpec())  # whole, on every process

    return jax.jit(run)

  def report(self, rows: dict[str, np.ndarray], results: dict[str, float], folder: Path) -> list[Path]:
    table: list[tuple[Any, ...]] = [("class", "IoU", "Acc", "pixels")]
    table += list(zip(self._names(), rows["IoU"], rows["Acc"], rows["labelled"], strict=True))
    return [metrics.write_csv(folder / "per_class.csv", table)]

  def figures(self, variables: Variables, frozen: PyTree, batch: Batch) -> dict[str, np.ndarray]:
    """Rows: image, the prediction laid over it, the label map laid over it; below a legend of the classes shown."""
    image = np.asarray(augment.to_float(batch["image"]))[: drawing.COLUMNS]
    logits = resize_bilinear(
      self.module.apply(variables, self._image(batch["image"]))["logits"], self.image_size
    )
    label = np.asarray(batch["label_map"])[: drawing.COLUMNS]
    guess = np.asarray(logits.argmax(-1))[: drawing.COLUMNS]
    rows = {
      "image": image,
      "prediction": drawing.overlay(image, guess, self.colors),
      "label map": drawing.overlay(image, label, self.colors),
    }
    shown = [i for i in range(self.num_classes) if (guess == i).any() or (label == i).any()]
    legend = [(self.colors[i], self._names()[i]) for i in shown]
    return {"segmentation": drawing.add_legend(drawing.labeled_rows(rows), legend)}

  def check_source(self, source: Source) -> None:
    super().check_source(source)
    segmentation.check_not_only_255(source, self.reader())

  def adapt(self, pretrained: Pretrained, shapes: PyTree) -> dict[str, Any]:
    check_order(pretrained.description.get("labels") or (), self.class_names)
    return super().adapt(pretrained, shapes)

  def load_collections(self, path: str) -> Variables:
    return weights_io.load(path).collections

  def describe(self) -> dict[str, Any]:
    return dict(
      kind=self.kind,
      module=base.field_values(self.module),
      preprocessing={
        **self.image_preprocessing(),
        "resize": "short_side",
        "sliding": self.sliding.describe(),
      },
      labels=list(self.class_names),
      palette=self.colors.tolist() if len(self.palette) else [],
    )


def _names_and_colors(
  options: Any, palette: str | tuple[Any, ...], source: Any, count: int
) -> tuple[tuple[str, ...], np.ndarray]:
  """Names of the classes (() if neither config nor data give them) and their colors, uint8 [C, 3]."""
  names = tuple(options.class_names)
  if names and not (len(names) == count and all(isinstance(name, str) for name in names)):
    raise UserError(
      f"config key 'segment.class_names': {len(names)} names, there are {count} classes (data.num_classes); give one "
      f"name for each, found {names[:3]!r}, ..."
    )
  own = source.map_class_names
  try:
    if options.label_colors:
      colors = _colors_of_classes(options, palette, count)
    else:
      colors = drawing.class_colors(palette, count)
  except ValueError as error:
    raise UserError(f"config key 'segment.palette': {error}") from None
  return names or (own if len(own) == count else ()), colors


def _colors_of_classes(options: Any, palette: str | tuple[Any, ...], count: int) -> np.ndarray:
  """The part of the palette that belongs to the classes, uint8 [C, 3], where label maps have its colors."""
  found, first = drawing.as_colors(palette), int(options.reduce_zero_label)
  wanted = first + count
  if len(found) not in (wanted, wanted + (options.ignore_label == wanted)):
    raise ValueError(
      f"{len(found)} colors for {count} classes; with segment.label_colors there is one for each value: "
      f"{'0, which is ignored, and then ' * first}the classes, and possibly one more, whose position is "
      f"segment.ignore_label={wanted}"
    )
  if len(np.unique(found, axis=0)) < len(found):
    raise ValueError("two classes have the same color, so label maps cannot tell them apart")
  return found[first:wanted]


def _default_out_indices(depth: int) -> tuple[int, ...]:
  """The blocks of the released models; at other depths the last block of each quarter."""
  return OUT_INDICES.get(depth, tuple(math.ceil(depth / 4 * (i + 1)) - 1 for i in range(4)))


def _sizes(
  source: Any, reader: segmentation.LabelMapReader, bad_images: BadImageTracker
) -> dict[int, tuple[int, int]]:
  """Index -> (height, width) of the images that can be read; every process reads all of them."""
  sizes = {}
  for index in range(len(source)):
    try:
      image, _ = segmentation.read_full_size(source, reader, index)
      sizes[index] = image.shape[:2]
    except BadImage:
      pass
    bad_images.update(np.array([index]), np.array([index not in sizes]))
  return sizes
