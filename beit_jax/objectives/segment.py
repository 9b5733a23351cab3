"""Semantic segmentation: UPerNet or SETR-PUP on a BEiT encoder, trained on crops, evaluated by sliding windows.

Follows unilm `beit/semantic_segmentation` (mmseg 0.11). The loss is the mean over the pixels that have a class; mmseg
divides by the number of all pixels (docs/conflicts.md).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import augment, checkpoint, losses, metrics, pictures, sharding, windows
from beit_jax.config import Maybe, pair
from beit_jax.data import segmentation
from beit_jax.errors import UserError
from beit_jax.logs import log
from beit_jax.models.resize import resize_bilinear
from beit_jax.models.upernet import BeitForSemanticSegmentation
from beit_jax.objectives import base

TAPS = {
  12: (3, 5, 7, 11),
  24: (7, 11, 15, 23),
}  # unilm's configs; other depths: the last block of each quarter


class Segment(base.Objective):
  """Cross-entropy of every pixel, of the decode head and, weighted, of the auxiliary heads."""

  kind = "segmenter"

  def __init__(self, config, source):
    super().__init__(config, source)
    model, options = config.model, config.segment
    self.num_classes = model.num_classes or config.data.num_classes
    if not self.num_classes:
      raise UserError(
        "config key 'data.num_classes': label maps do not say how many classes there are; set it"
      )
    if not 0 < self.num_classes < segmentation.IGNORE:
      raise UserError(f"config key 'data.num_classes': {self.num_classes} must lie in [1, 254]")
    if options.mode not in ("slide", "whole"):
      raise UserError(
        f"config key 'segment.mode': {options.mode!r} is unknown; there are 'slide' and 'whole'"
      )
    encoder = base.encoder_fields(model, self.image_size, pretrain=False)
    encoder["weight_init"] = "finetune"
    fields = {name: model[name] for name in self.model_fields() if name in _own_fields()}
    quarter = encoder["depth"] / 4
    fields["out_indices"] = tuple(model.out_indices) or TAPS.get(
      encoder["depth"], tuple(math.ceil(quarter * (i + 1)) - 1 for i in range(4))
    )
    self.module = BeitForSemanticSegmentation(encoder, **{**fields, "num_classes": self.num_classes})
    self.stride = pair(options.stride, "segment.stride") if options.stride else self.image_size

  @classmethod
  def model_fields(cls):
    own = {**_own_fields(), "num_classes": Maybe(int), "channels": Maybe(int), "out_indices": ()}
    return {**base.encoder_schema(), **own}

  @property
  def depth(self):
    return self.module.encoder["depth"]

  def reader(self):
    config = self.config
    return segmentation.Maps(
      self.image_size, self.num_classes, config.data.to_dict(), config.segment.to_dict()
    )

  def init(self, key):
    return self.module.init(key, jnp.zeros((1, *self.image_size, 3)))

  def _image(self, pixels):
    return augment.normalize(augment.to_float(pixels), self.config.data.mean, self.config.data.std)

  def loss(self, variables, frozen, batch, key, step):
    del frozen, step
    rngs = {"drop_path": key, "dropout": jax.random.fold_in(key, 1)}
    out, collections = self.module.apply(
      variables, self._image(batch["image"]), train=True, rngs=rngs, mutable=["batch_stats"]
    )
    label = batch["label_map"]
    entropy = lambda logits: losses.segmentation_cross_entropy(
      resize_bilinear(logits, self.image_size), label
    )  # noqa: E731
    total, count, correct = entropy(out["logits"])
    aux = out["aux"] if isinstance(out["aux"], tuple) else (out["aux"],)
    aux = sum(entropy(logits)[0] for logits in aux)
    sums = {"loss": (total + self.config.segment.aux_weight * aux, count)}
    sums |= {"decode_loss": (total, count), "pixel_acc": (correct, count)}
    return sums["loss"][0], (sums, dict(collections))

  def eval_step(self, variables, frozen, batch):
    """Of crops; the metrics of whole images are those of `evaluate_images`."""
    del frozen
    logits = resize_bilinear(
      self.module.apply(variables, self._image(batch["image"]))["logits"], self.image_size
    )
    label = jnp.where(batch["valid"][:, None, None], batch["label_map"], segmentation.IGNORE)
    total, count, correct = losses.segmentation_cross_entropy(logits, label)
    return {"loss": (total, count), "pixel_acc": (correct, count)}

  # Evaluation of whole images.

  def evaluate_images(self, variables: Any, source: Any, mesh: jax.sharding.Mesh) -> tuple[dict, dict]:
    """mIoU, mAcc and aAcc over images of any size, from histograms summed over the whole set.

    Returns:
      (metrics, rows per class: IoU, Acc, labelled pixels).
    """
    options = self.config.segment
    scales = tuple(options.scales)
    reader = self.reader()
    sizes = [_size(source, reader, i) for i in range(len(source))]
    histogram = np.zeros((3, self.num_classes), np.int64)
    # One program a bucket and scale, and one a bucket for the histogram: eight in all for one scale.
    for indices in windows.buckets(sizes, max(1, options.programs // (len(scales) + 1))):
      histogram += self._evaluate_bucket(variables, source, reader, indices, sizes, scales, mesh)
    found = windows.mean_iou(*histogram.astype(np.float64))
    rows = {"IoU": found.pop("IoU"), "Acc": found.pop("Acc"), "labelled": histogram[2]}
    return found, rows

  def _evaluate_bucket(self, variables, source, reader, indices, sizes, scales, mesh):
    label_shape = tuple(np.max([sizes[i] for i in indices], 0))
    geometry = [self._geometry([sizes[i] for i in indices], scale) for scale in scales]
    flips = (False, True) if self.config.segment.flip else (False,)
    rows = sharding.local_rows(mesh, mesh.size)
    histogram = np.zeros((3, self.num_classes), np.int64)
    for start in range(0, len(indices), mesh.size):
      chosen = [int(indices[min(start + row, len(indices) - 1)]) for row in rows]
      real = [start + row < len(indices) for row in rows]
      examples = [segmentation.whole(source, reader, i) for i in chosen]
      label = np.full((len(rows), *label_shape), segmentation.IGNORE, np.uint8)
      for place, (_, mine) in enumerate(examples):
        if real[place]:
          label[place, : mine.shape[0], : mine.shape[1]] = mine
      total = None
      for canvas, count, scale in geometry:
        for flip in flips:
          inputs = [self._inputs(image, canvas, count, scale, flip, label_shape) for image, _ in examples]
          batch = {name: np.stack([x[name] for x in inputs]) for name in inputs[0]}
          batch = sharding.put_batch(mesh, batch, mesh.size)
          share = self._probabilities(variables, batch)
          total = share if total is None else total + share
      counts = self._histogram(total, sharding.put_batch(mesh, {"label": label}, mesh.size)["label"])
      histogram += np.asarray(jax.device_get(counts), np.int64)
    return histogram

  def _geometry(self, sizes, scale):
    """(padded canvas (H, W), windows an image, scale) that fit all images of a bucket."""
    resized = [self._resized(size, scale) for size in sizes]
    canvas = tuple(np.maximum(np.max(resized, 0), self.image_size))
    return canvas, max(len(self._windows(size)) for size in resized), scale

  def _resized(self, size, scale):
    """(height, width) at which an image is seen; never smaller than a window on its short side, where it slides."""
    if self.config.segment.mode == "whole":
      return self.image_size
    width, height = segmentation.rescale_size(
      size[::-1], tuple(scale * s for s in self.config.segment.resize)
    )
    short = max(side / have for side, have in zip(self.image_size, (height, width), strict=True))
    if min(height, width) < min(self.image_size):
      height, width = (math.ceil(side * short) for side in (height, width))
    return height, width

  def _windows(self, size):
    return windows.windows(size, self.image_size, self.stride)

  def _inputs(self, image, canvas, count, scale, flip, label_shape):
    """One image's arrays for `_probabilities`: padded pixels, window corners and weights, resize matrices."""
    height, width = size = self._resized(image.shape[:2], scale)
    pixels = segmentation.resize_image(image, size, self.config.data.interpolation)
    padded = np.empty((*canvas, 3), np.uint8)
    padded[:] = [int(255 * m + 0.5) for m in self.config.data.mean]
    padded[:height, :width] = pixels[:, ::-1] if flip else pixels
    corners, weight = np.zeros((count, 2), np.int32), np.zeros(count, np.float32)
    for i, (top, _, left, _) in enumerate(self._windows(size)):
      corners[i], weight[i] = (top, left), 1.0
    matrix = functools.partial(windows.resize_matrix)
    return dict(
      image=padded,
      corners=corners,
      weight=weight,
      rows=matrix(height, image.shape[0], rows=label_shape[0], columns=canvas[0]),
      columns=matrix(width, image.shape[1], rows=label_shape[1], columns=canvas[1], flip=flip),
    )

  @functools.cached_property
  def _probabilities(self):
    """(variables, batch) -> float32 [B, H, W, C]: softmax at label size of the windows' averaged logits."""
    crop = self.image_size

    def run(variables, batch):
      image = batch["image"]

      def add(carry, window):
        corners, weight = window
        cut = lambda x, at: jax.lax.dynamic_slice(x, (at[0], at[1], 0), (*crop, x.shape[-1]))  # noqa: E731
        pixels = self._image(jax.vmap(cut)(image, corners))
        logits = resize_bilinear(self.module.apply(variables, pixels)["logits"], crop)

        def put(total, logits, at, weight):
          ones = jnp.ones((*crop, 1))
          value = jnp.concatenate([logits, ones], -1) * weight
          return jax.lax.dynamic_update_slice(total, cut(total, at) + value, (at[0], at[1], 0))

        return jax.vmap(put)(carry, logits, corners, weight), None

      zeros = jnp.zeros((*image.shape[:3], self.num_classes + 1))
      steps = (jnp.moveaxis(batch["corners"], 1, 0), jnp.moveaxis(batch["weight"], 1, 0))
      total, _ = jax.lax.scan(add, zeros, steps)
      mean = total[..., :-1] / jnp.maximum(total[..., -1:], 1.0)
      mean = jnp.einsum("byh,bhwc->bywc", batch["rows"], mean, precision="highest")
      mean = jnp.einsum("bxw,bywc->byxc", batch["columns"], mean, precision="highest")
      return jax.nn.softmax(mean)

    return jax.jit(run)

  @functools.cached_property
  def _histogram(self):
    """(scores [B, H, W, C], labels [B, H, W]) -> int32 [3, C]: valid pixels that are right, predicted, labelled."""

    def run(scores, label):
      classes = jnp.arange(self.num_classes)
      guess = jnp.where(label == segmentation.IGNORE, segmentation.IGNORE, scores.argmax(-1))
      guess, label = guess[..., None] == classes, label[..., None] == classes
      return jnp.stack([x.sum((0, 1, 2), dtype=jnp.int32) for x in (guess & label, guess, label)])

    return jax.jit(run)

  def report(self, rows, results, folder):
    table = [("class", "IoU", "Acc", "pixels")]
    table += [(c, rows["IoU"][c], rows["Acc"][c], rows["labelled"][c]) for c in range(self.num_classes)]
    return [metrics.write_csv(folder / "per_class.csv", table)]

  def figures(self, variables, frozen, batch):
    """Rows: image, the prediction laid over it, the label map laid over it."""
    image = np.asarray(augment.to_float(batch["image"]))
    logits = resize_bilinear(
      self.module.apply(variables, self._image(batch["image"]))["logits"], self.image_size
    )
    label = np.asarray(batch["label_map"])
    guess = np.asarray(logits.argmax(-1))
    rows = {
      "image": image,
      "prediction": pictures.overlay(image, guess),
      "label map": pictures.overlay(image, label),
    }
    return {"segmentation": pictures.table(rows)}

  def adapt(self, pretrained, shapes):
    return base.adapt_encoder(self, pretrained, shapes, log.info)

  def load_collections(self, path):
    return checkpoint.load_params(checkpoint.find(path), "rest")["collections"]

  def describe(self):
    fields = base.module_fields(BeitForSemanticSegmentation)
    return dict(
      kind=self.kind,
      module={name: getattr(self.module, name) for name in fields},
      preprocessing={**self.image_preprocessing(), "resize": "short_side"},
    )


def _own_fields() -> dict[str, Any]:
  return base.module_fields(BeitForSemanticSegmentation, without=("encoder",))


def _size(source: Any, reader: segmentation.Maps, index: int) -> tuple[int, int]:
  """(height, width) of an image."""
  image, _ = segmentation.whole(source, reader, index)
  return image.shape[:2]
