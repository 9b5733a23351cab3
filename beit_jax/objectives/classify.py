"""Image classification: fine-tuning a pre-trained encoder, or training the same network from scratch."""

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import augment, losses, metrics
from beit_jax.config.parse import OptionalOf
from beit_jax.data import drawing
from beit_jax.errors import UserError
from beit_jax.models.beit import BeitForImageClassification
from beit_jax.objectives import base
from beit_jax.objectives import encoder as encoder_keys
from beit_jax.runtime.logs import log

MAX_CONFUSION = 2000  # classes; a matrix of more is for nobody
TOP = 5  # classes an image that a list of predictions names


def _sigmoid(x):
  return 0.5 + 0.5 * np.tanh(x.astype(np.float64) / 2)


class Classification(base.Objective):
  """Softmax cross-entropy with label smoothing over mean-pooled patches (or the cls token).

  With several labels an image: binary cross-entropy, mean average precision.
  """

  kind = "classifier"
  augmentations = ("color_jitter", "random_erasing")

  def __init__(self, config, source, load=None):
    super().__init__(config, source, load)
    model = config.model
    found = source.num_classes
    if not source.has_labels or (not found and (not model.num_classes or source.multi_label)):
      raise UserError(
        "config key 'data': this data has no labels, so nothing can be classified; use folders named by class or "
        f"set data.label_key ({source.description})"
      )
    if model.num_classes and found and (found > model.num_classes or source.multi_label):
      raise UserError(
        f"config key 'model.num_classes': {model.num_classes}, but the data has {found} classes"
      )
    if model.pool not in ("mean", "cls"):
      raise UserError(f"config key 'model.pool': {model.pool!r} is unknown; there are 'mean' and 'cls'")
    options = config.loss
    self.multi_label = source.multi_label
    self.eval_metrics = ("loss", "mAP") if self.multi_label else ("loss", "acc1", "acc5")
    self.mixing = options.mixup_alpha > 0 or options.cutmix_alpha > 0
    encoder = encoder_keys.encoder_fields(model, self.image_size, pretrain=False)
    encoder["weight_init"] = "finetune"
    self.module = BeitForImageClassification(
      encoder, model.num_classes or found, model.pool, model.head_init_scale
    )

  @classmethod
  def model_fields(cls):
    own = base.module_fields(BeitForImageClassification, without=("encoder",))
    return {**encoder_keys.encoder_schema(), **own, "num_classes": OptionalOf(int)}

  @property
  def depth(self):
    return self.module.encoder["depth"]

  def views(self):
    return {"image": (self.image_size, self.config.data.interpolation)}

  def init(self, key):
    with base.building():
      return self.module.init(key, jnp.zeros((1, *self.image_size, 3)))

  def _image(self, batch, *, train):
    """Normalised pixels; in training jittered (unless RandAugment did that on the host) and partly erased."""
    data = self.config.data
    image = augment.to_float(batch["image"])
    keys = lambda purpose: augment.example_keys(self.config.seed, batch["example_key"], purpose)  # noqa: E731
    if train and data.color_jitter and not data.rand_augment:
      (image,) = augment.color_jitter(keys("jitter"), [image], data.color_jitter)
    image = augment.normalize(image, data.mean, data.std)
    if train and data.random_erasing:
      image = augment.random_erasing(keys("erase"), image, data.random_erasing)
    return image

  def _targets(self, label, smoothing):
    """float32 [B, C]; those of several labels are smoothed in their loss."""
    return label if self.multi_label else losses.smooth_labels(label, self.module.num_classes, smoothing)

  def _nll(self, logits, targets, smoothing):
    if self.multi_label:
      return losses.binary_cross_entropy(logits, targets, smoothing)
    return losses.soft_target_cross_entropy(logits, targets)

  def loss(self, variables, frozen, batch, key, step):
    del frozen, step
    options, image = self.config.loss, self._image(batch, train=True)
    targets = self._targets(batch["label"], options.label_smoothing)
    if self.mixing:
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
    sums = {"loss": (loss, count)}
    if not self.multi_label and not self.mixing:  # of a mixed image neither class is the right one
      sums["acc1"] = ((logits.argmax(-1) == batch["label"]).sum().astype(jnp.float32), count)
    return loss, (sums, {})

  def eval_step(self, variables, frozen, batch):
    del frozen
    logits = self.module.apply(variables, self._image(batch, train=False))
    valid, label = batch["valid"].astype(jnp.float32), batch["label"]
    nll, count = self._nll(logits, self._targets(label, 0.0), 0.0), valid.sum()
    sums = {"loss": ((nll * valid).sum(), count)}
    if self.multi_label:
      return {**sums, "rows": dict(score=logits, label=label, valid=batch["valid"])}
    # Rank of the true class, so that ties count against us.
    own = jnp.take_along_axis(logits, label[:, None], 1)
    rank = ((logits >= own) & (jnp.arange(logits.shape[-1]) != label[:, None])).sum(1)
    for name, k in (("acc1", 1), ("acc5", 5)):
      sums[name] = (((rank < k) * valid).sum(), count)
    if self.config.eval_only:
      probability, top = jax.lax.top_k(jax.nn.softmax(logits), min(TOP, logits.shape[-1]))
      sums["rows"] = dict(probability=probability, top=top, label=label, valid=batch["valid"])
    return sums

  def summarize_rows(self, rows):
    return {"mAP": metrics.mean_average_precision(rows["score"], rows["label"])} if self.multi_label else {}

  def report(self, rows, results, folder):
    """per_class.csv, confusion.csv (one label an image) and, with eval.predictions, predictions.jsonl."""
    count = self.module.num_classes
    names = list(self.source.class_names) + [str(i) for i in range(len(self.source.class_names), count)]
    if self.multi_label:
      score, label = rows["score"], rows["label"]
      table = [("class", "positives", "average_precision")]
      precisions = [metrics.average_precision(score[:, c], label[:, c]) for c in range(count)]
      table += [(names[c], int(label[:, c].sum()), precisions[c]) for c in range(count)]
      files = [metrics.write_csv(folder / "per_class.csv", table)]
      predictions = [
        {"index": i, "labels": [names[c] for c in np.flatnonzero(t)], "scores": _sigmoid(s).tolist()}
        for i, (s, t) in enumerate(zip(score, label, strict=True))
      ]
    else:
      guess = rows["top"][:, 0]
      seen = np.bincount(rows["label"], minlength=count)
      right = np.bincount(rows["label"][rows["label"] == guess], minlength=count)
      table = [("class", "examples", "correct", "acc1")]
      table += [(names[c], seen[c], right[c], right[c] / seen[c] if seen[c] else "") for c in range(count)]
      files = [metrics.write_csv(folder / "per_class.csv", table)]
      if count <= MAX_CONFUSION:
        matrix = metrics.confusion_matrix(rows["label"], guess, count)
        lines = [[name, *row] for name, row in zip(names, matrix, strict=True)]
        files.append(metrics.write_csv(folder / "confusion.csv", [["true \\ predicted", *names], *lines]))
      predictions = [
        {"index": i, "label": names[label], "top": [names[c] for c in top], "probability": p.tolist()}
        for i, (label, top, p) in enumerate(zip(rows["label"], rows["top"], rows["probability"], strict=True))
      ]
    if self.config.eval.predictions:
      files.append(metrics.write_jsonl(folder / "predictions.jsonl", predictions))
    return files

  def figures(self, variables, frozen, batch):
    """Images with the predicted class, a tick or the true class beside it."""
    if self.multi_label:
      return {}
    logits = np.asarray(self.module.apply(variables, self._image(batch, train=False)))
    names = self.source.class_names or [str(i) for i in range(self.module.num_classes)]
    captions = [
      names[guess] if guess == true else f"{names[guess]} (is {names[true]})"
      for guess, true in zip(logits.argmax(-1), np.asarray(batch["label"]), strict=True)
    ]
    return {"predictions": drawing.captioned(np.asarray(augment.to_float(batch["image"])), captions)}

  def adapt(self, pretrained, shapes):
    labels, ours = list(pretrained.description.get("labels") or ()), list(self.source.class_names)
    if labels != ours and sorted(labels) == sorted(ours):
      raise UserError(
        f"init_from: the checkpoint has the same classes as the data in another order ({labels[0]!r} is class 0 there, "
        f"{ours[0]!r} here)"
      )
    if len(labels) == len(ours) and labels != ours:  # as the reference, which looks at shapes only
      log.info(
        "head: kept, though its classes are called %s, ... and those of the data %s, ...", labels[0], ours[0]
      )
    return encoder_keys.adapt_encoder(self, pretrained, shapes, log.info)

  def describe(self):
    fields = ("encoder", "num_classes", "pool", "head_init_scale")
    return dict(
      kind=self.kind,
      module={name: getattr(self.module, name) for name in fields},
      preprocessing=self.image_preprocessing(),
      labels=list(self.source.class_names),
      multi_label=self.multi_label,
    )
