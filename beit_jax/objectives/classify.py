"""Image classification: fine-tuning a pre-trained encoder, or training the same network from scratch."""

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import augment, losses, pictures
from beit_jax.config import Maybe
from beit_jax.errors import UserError
from beit_jax.logs import log
from beit_jax.models.beit import BeitForImageClassification
from beit_jax.objectives import base


class Classify(base.Objective):
  """Softmax cross-entropy with label smoothing over mean-pooled patches (or the cls token)."""

  kind = "classifier"

  def __init__(self, config, source):
    super().__init__(config, source)
    model = config.model
    found = source.num_classes
    if not found and not model.num_classes:
      raise UserError(
        "config key 'data': this data has no labels, so nothing can be classified; use folders named by class or "
        f"set data.label_key ({source.description})"
      )
    if model.num_classes and found and found > model.num_classes:
      raise UserError(
        f"config key 'model.num_classes': {model.num_classes}, but the data has {found} classes"
      )
    if model.pool not in ("mean", "cls"):
      raise UserError(f"config key 'model.pool': {model.pool!r} is unknown; there are 'mean' and 'cls'")
    encoder = base.encoder_fields(model, self.image_size, pretrain=False)
    encoder["weight_init"] = "finetune"
    self.module = BeitForImageClassification(
      encoder, model.num_classes or found, model.pool, model.head_init_scale
    )

  @classmethod
  def model_fields(cls):
    own = base.module_fields(BeitForImageClassification, without=("encoder",))
    return {**base.encoder_schema(), **own, "num_classes": Maybe(int)}

  @property
  def depth(self):
    return self.module.encoder["depth"]

  def views(self):
    return {"image": (self.image_size, self.config.data.interpolation)}

  def init(self, key):
    return self.module.init(key, jnp.zeros((1, *self.image_size, 3)))

  def _image(self, batch, *, train):
    data = self.config.data
    image = augment.to_float(batch["image"])
    if train and data.color_jitter:
      keys = augment.example_keys(self.config.seed, batch["example_key"], "jitter")
      (image,) = augment.color_jitter(keys, [image], data.color_jitter)
    return augment.normalize(image, data.mean, data.std)

  def loss(self, variables, frozen, batch, key, step):
    del frozen, step
    image = self._image(batch, train=True)
    logits = self.module.apply(variables, image, train=True, rngs={"drop_path": key})
    targets = losses.smooth_labels(batch["label"], self.module.num_classes, self.config.loss.label_smoothing)
    loss = losses.soft_target_cross_entropy(logits, targets).sum()
    count = jnp.asarray(len(logits), jnp.float32)
    correct = (logits.argmax(-1) == batch["label"]).sum().astype(jnp.float32)
    return loss, ({"loss": (loss, count), "acc1": (correct, count)}, {})

  def eval_step(self, variables, frozen, batch):
    del frozen
    logits = self.module.apply(variables, self._image(batch, train=False))
    valid, label = batch["valid"].astype(jnp.float32), batch["label"]
    nll = losses.soft_target_cross_entropy(logits, jax.nn.one_hot(label, logits.shape[-1]))
    # Rank of the true class, so that ties count against us.
    own = jnp.take_along_axis(logits, label[:, None], 1)
    rank = ((logits >= own) & (jnp.arange(logits.shape[-1]) != label[:, None])).sum(1)
    count = valid.sum()
    return {
      "loss": ((nll * valid).sum(), count),
      "acc1": (((rank < 1) * valid).sum(), count),
      "acc5": (((rank < 5) * valid).sum(), count),
    }

  def figures(self, variables, frozen, batch):
    """Images with the predicted class, a tick or the true class beside it."""
    logits = np.asarray(self.module.apply(variables, self._image(batch, train=False)))
    names = self.source.class_names or [str(i) for i in range(self.module.num_classes)]
    captions = [
      names[guess] if guess == true else f"{names[guess]} (is {names[true]})"
      for guess, true in zip(logits.argmax(-1), np.asarray(batch["label"]), strict=True)
    ]
    return {"predictions": pictures.captioned(np.asarray(augment.to_float(batch["image"])), captions)}

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
    return base.adapt_encoder(self, pretrained, shapes, log.info)

  def describe(self):
    fields = ("encoder", "num_classes", "pool", "head_init_scale")
    return dict(
      kind=self.kind,
      module={name: getattr(self.module, name) for name in fields},
      preprocessing=self.image_preprocessing(),
      labels=list(self.source.class_names),
    )
