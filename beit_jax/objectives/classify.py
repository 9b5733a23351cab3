"""Image classification: fine-tuning a pre-trained encoder, or training the same network from scratch."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from beit_jax import augment, losses, metrics
from beit_jax.config import ranges
from beit_jax.config.defaults import OptionalOf
from beit_jax.data import drawing, views
from beit_jax.data.labels import check_order
from beit_jax.data.sources import Source
from beit_jax.errors import UserError
from beit_jax.models.beit import POOLS, BeitForImageClassification
from beit_jax.objectives import base
from beit_jax.objectives.base import Array, Batch, EvalOutput, Loader, LossOutput, Metric, PyTree, Variables
from beit_jax.objectives.encoder import EncoderObjective, encoder_fields, head_schema
from beit_jax.runtime.logs import log
from beit_jax.weights.pretrained import Pretrained

Rows = dict[str, np.ndarray]
MAX_CONFUSION_CLASSES = 2000  # larger confusion matrices are not useful
TOP_CLASSES = 5  # classes of an image in predictions.jsonl


class Classification(EncoderObjective):
  """Softmax cross-entropy with label smoothing on mean-pooled patches or on the cls token.

  With several labels per image: binary cross-entropy, evaluated by mean average precision.
  """

  kind = "classifier"
  augmentations = tuple(augment.AUGMENTATIONS)
  labels = "class"
  value_ranges = (
    (r"loss\.(mixup_alpha|cutmix_alpha)", ranges.number(0)),
    (r"loss\.(label_smoothing|mix_prob|mix_switch_prob)", ranges.fraction()),
  )

  def __init__(self, config: ConfigDict, source: Source, load: Loader | None = None) -> None:
    super().__init__(config, source, load)
    self.multi_label = source.multi_label
    self.eval_metrics = ("loss", "mAP") if self.multi_label else ("loss", "acc1", "acc5")
    self.mixes = config.loss.mixup_alpha > 0 or config.loss.cutmix_alpha > 0
    self.module = self.make_module(config.model, self.image_size, self._num_classes())

  @classmethod
  def config_section(cls) -> dict[str, Any]:
    return dict(
      model={
        **head_schema(BeitForImageClassification),
        "num_classes": OptionalOf(int),
      },  # None = that of the data
      loss=dict(
        label_smoothing=0.1,
        mixup_alpha=0.0,
        cutmix_alpha=0.0,
        mix_prob=1.0,  # probability that a batch is mixed
        mix_switch_prob=0.5,  # probability of cutmix rather than mixup, if both are on
      ),
    )

  @classmethod
  def make_module(
    cls, model: ConfigDict, image_size: tuple[int, int], outputs: int
  ) -> BeitForImageClassification:
    encoder = {**encoder_fields(model, image_size, pretrain=False), "weight_init": "finetune"}
    if "registers" in POOLS[model.pool] and not encoder["register_tokens"]:
      raise UserError(f"config key 'model.pool': {model.pool!r} needs model.register_tokens, found 0")
    return BeitForImageClassification(encoder, outputs, model.pool, model.head_init_scale)

  @classmethod
  def expected_outputs(cls, config: ConfigDict) -> int:
    return config.model.num_classes or config.data.num_classes or 1000

  def _num_classes(self) -> int:
    source, wanted = self.source, self.config.model.num_classes
    if source.has_labels and not (source.num_classes or wanted):
      raise UserError(
        "config key 'model.num_classes': the data do not say how many classes they have; set it, or data.class_file"
      )
    if not source.has_labels or not (source.num_classes or (wanted and not self.multi_label)):
      raise UserError(
        "config key 'data': this data has no labels to classify; use folders named by class or set data.label_key "
        f"({source.description})"
      )
    if wanted and source.num_classes and (source.num_classes > wanted or self.multi_label):
      raise UserError(
        f"config key 'model.num_classes': {wanted}, but the data has {source.num_classes} classes"
      )
    count = wanted or source.num_classes
    if count < 2 and not self.multi_label:
      raise UserError(
        f"config key 'data': one class only ({', '.join(source.class_names) or 'class 0'}), so that every answer is "
        f"right; a classifier needs two or more ({source.description})"
      )
    return count

  def reader(self) -> Any:
    data = self.config.data.to_dict()
    return views.ViewReader(self.views(), data, self.module.num_classes, self.multi_label)

  def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    labels = ((self.module.num_classes,), jnp.float32) if self.multi_label else ((), jnp.int32)
    return {**super().batch_shapes(batch_size), **base.with_common_arrays({"label": labels}, batch_size)}

  def _targets(self, label: Array, smoothing: float) -> Array:
    """float32 [B, C]. With several labels per image, `_nll` does the smoothing."""
    return label if self.multi_label else losses.smooth_labels(label, self.module.num_classes, smoothing)

  def _nll(self, logits: Array, targets: Array, smoothing: float) -> Array:
    if self.multi_label:
      return losses.binary_cross_entropy(logits, targets, smoothing)
    return losses.soft_target_cross_entropy(logits, targets)

  def loss(self, variables: Variables, frozen: PyTree, batch: Batch, key: Array, step: Array) -> LossOutput:
    del frozen, step
    options, image = self.config.loss, self.normalized_image(batch, train=True)
    targets = self._targets(batch["label"], options.label_smoothing)
    if self.mixes:
      image, targets = augment.random_mix(
        jax.random.fold_in(key, 1),
        image,
        targets,
        mixup_alpha=options.mixup_alpha,
        cutmix_alpha=options.cutmix_alpha,
        prob=options.mix_prob,
        switch_prob=options.mix_switch_prob,
      )
    logits = self.module.apply(variables, image, train=True, rngs={"drop_path": key})
    loss = self._nll(logits, targets, options.label_smoothing).sum()
    count = jnp.asarray(len(logits), jnp.float32)
    sums = {"loss": Metric(loss, count)}
    if not self.multi_label and not self.mixes:  # a mixed image has no single true class
      correct = (logits.argmax(-1) == batch["label"]).sum().astype(jnp.float32)
      sums["acc1"] = Metric(correct, count)
    return LossOutput(sums)

  def eval_step(self, variables: Variables, frozen: PyTree, batch: Batch) -> EvalOutput:
    del frozen
    logits = self.module.apply(variables, self.normalized_image(batch, train=False))
    valid, label = batch["valid"].astype(jnp.float32), batch["label"]
    nll, count = self._nll(logits, self._targets(label, 0.0), 0.0), valid.sum()
    sums = {"loss": Metric((nll * valid).sum(), count)}
    if self.multi_label:
      return EvalOutput(sums, dict(score=logits, label=label, valid=batch["valid"]))
    # The rank of the true class; ties count as errors.
    true = jnp.take_along_axis(logits, label[:, None], 1)
    rank = ((logits >= true) & (jnp.arange(logits.shape[-1]) != label[:, None])).sum(1)
    for name, k in (("acc1", 1), ("acc5", 5)):
      sums[name] = Metric(((rank < k) * valid).sum(), count)
    if not self.config.eval_only:
      return EvalOutput(sums)
    probability, top = jax.lax.top_k(jax.nn.softmax(logits), min(TOP_CLASSES, logits.shape[-1]))
    return EvalOutput(sums, dict(probability=probability, top=top, label=label, valid=batch["valid"]))

  def summarize_rows(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
    return {"mAP": metrics.mean_average_precision(rows["score"], rows["label"])} if self.multi_label else {}

  def report(self, rows: dict[str, np.ndarray], metrics_: dict[str, float], folder: Path) -> list[Path]:
    """Writes per_class.csv, confusion.csv (one label per image) and, with eval.predictions, predictions.jsonl."""
    del metrics_
    count = self.module.num_classes
    names = [*self.source.class_names, *map(str, range(len(self.source.class_names), count))]
    files = _report_scores(rows, names, folder) if self.multi_label else _report_classes(rows, names, folder)
    if self.config.eval.predictions:
      predictions = _predicted_scores(rows, names) if self.multi_label else _predicted_classes(rows, names)
      files.append(metrics.write_jsonl(folder / "predictions.jsonl", predictions))
    return files

  def figures(self, variables: Variables, frozen: PyTree, batch: Batch) -> dict[str, np.ndarray]:
    """Images with their predicted class and, where that is wrong, the true one."""
    if self.multi_label:
      return {}
    logits = np.asarray(self.module.apply(variables, self.normalized_image(batch, train=False)))
    names = self.source.class_names or [str(i) for i in range(self.module.num_classes)]
    captions = [
      names[guess] if guess == true else f"{names[guess]} (is {names[true]})"
      for guess, true in zip(logits.argmax(-1), np.asarray(batch["label"]), strict=True)
    ]
    return {"predictions": drawing.captioned_grid(np.asarray(augment.to_float(batch["image"])), captions)}

  def adapt(self, pretrained: Pretrained, shapes: PyTree) -> dict[str, Any]:
    if self.config.eval_only and pretrained.spec.has_classes:
      _check_comparable(pretrained, self.source)
    labels, ours = list(pretrained.description.get("labels") or ()), list(self.source.class_names)
    check_order(labels, ours)
    if len(labels) == len(ours) and labels != ours:  # the reference, too, compares shapes only
      log.info(
        "head: kept, though its classes are called %s, ... and those of the data %s, ...", labels[0], ours[0]
      )
    found = super().adapt(pretrained, shapes)
    if not pretrained.description.get("regression"):
      return found
    log.info("head: starts from random values, since that of the checkpoint gives values and not classes")
    return {name: value for name, value in found.items() if not name.startswith("head/")}

  def describe(self) -> dict[str, Any]:
    labels = list(self.source.class_names)
    return {**super().describe(), "labels": labels, "multi_label": self.multi_label}


def _check_comparable(pretrained: Pretrained, source: Source) -> None:
  """Raises a UserError if the labels of a source cannot be compared with the outputs of a model."""
  facts, outputs = pretrained.description, pretrained.module.num_classes
  if facts.get("regression"):
    raise UserError(
      f"eval_only: {facts.get('path')} is a regression model (problem_type): its outputs are values, not classes; "
      "beit_jax.predict prints them"
    )
  if facts.get("multi_label", source.multi_label) != source.multi_label:
    kinds = ("several labels per image", "one label per image")[:: 1 if facts["multi_label"] else -1]
    raise UserError(
      f"eval_only: the model predicts {kinds[0]}, but the data has {kinds[1]} (data.label_file or data.label_key)"
    )
  if not facts.get("labels") and source.class_names and source.num_classes < outputs:
    raise UserError(
      f"eval_only: the model has {outputs} classes without names and the data {source.num_classes} "
      f"({', '.join(source.class_names[:5])}, ...), so it is unknown which of the {outputs} these are. Evaluate on "
      "data with all classes, or add their names to the checkpoint (id2label in Hugging Face's config.json, "
      "label_names in timm's)"
    )


def _report_scores(rows: Rows, names: list[str], folder: Path) -> list[Path]:
  """per_class.csv for several labels per image."""
  score, label = rows["score"], rows["label"]
  table: list[tuple[Any, ...]] = [("class", "positives", "average_precision")]
  for c, name in enumerate(names):
    table.append((name, int(label[:, c].sum()), metrics.average_precision(score[:, c], label[:, c])))
  return [metrics.write_csv(folder / "per_class.csv", table)]


def _report_classes(rows: Rows, names: list[str], folder: Path) -> list[Path]:
  """per_class.csv and, up to `MAX_CONFUSION_CLASSES` classes, confusion.csv."""
  guess, label, count = rows["top"][:, 0], rows["label"], len(names)
  seen = np.bincount(label, minlength=count)
  right = np.bincount(label[label == guess], minlength=count)
  table = [("class", "examples", "correct", "acc1")]
  table += [(names[c], seen[c], right[c], right[c] / seen[c] if seen[c] else "") for c in range(count)]
  files = [metrics.write_csv(folder / "per_class.csv", table)]
  if count <= MAX_CONFUSION_CLASSES:
    matrix = metrics.confusion_matrix(label, guess, count)
    lines = [[name, *row] for name, row in zip(names, matrix, strict=True)]
    files.append(metrics.write_csv(folder / "confusion.csv", [["true \\ predicted", *names], *lines]))
  return files


def _predicted_scores(rows: Rows, names: list[str]) -> list[dict[str, Any]]:
  """Lines of predictions.jsonl for several labels per image."""
  return [
    {"index": i, "labels": [names[c] for c in np.flatnonzero(label)], "scores": _sigmoid(score).tolist()}
    for i, (label, score) in enumerate(zip(rows["label"], rows["score"], strict=True))
  ]


def _predicted_classes(rows: Rows, names: list[str]) -> list[dict[str, Any]]:
  """Lines of predictions.jsonl for one label per image."""
  return [
    {"index": i, "label": names[label], "top": [names[c] for c in top], "probability": p.tolist()}
    for i, (label, top, p) in enumerate(zip(rows["label"], rows["top"], rows["probability"], strict=True))
  ]


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 0.5 + 0.5 * np.tanh(x.astype(np.float64) / 2)
