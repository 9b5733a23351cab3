"""DINO: self-distillation between views of an image (Caron et al., 2021), the strongest baseline of BEiT's Table 1."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from beit_jax import augment, losses, optim, trees
from beit_jax.config import ranges
from beit_jax.config.defaults import EitherOf
from beit_jax.config.parse import duration, pair
from beit_jax.data import drawing
from beit_jax.data.images import ViewSizes
from beit_jax.data.sources import Source
from beit_jax.data.views import Crops, MultiCropReader
from beit_jax.errors import UserError
from beit_jax.models.dino import Dino
from beit_jax.objectives.base import (
  Array,
  Batch,
  EvalOutput,
  Loader,
  LossOutput,
  Metric,
  PyTree,
  Variables,
  with_common_arrays,
)
from beit_jax.objectives.encoder import EncoderObjective, encoder_fields, encoder_schema
from beit_jax.weights import dino as weights_dino
from beit_jax.weights.pretrained import Pretrained

NUM_GLOBAL = 2


class SelfDistillation(EncoderObjective):
  """A student learns from some views of an image what its own moving average, the teacher, says of others.

  loss = mean over pairs (global view i, view j != i) of the cross-entropy between the teacher's distribution for i,
  centered and sharpened, and the student's for j. The parameters are the student's. The collection "teacher" holds the
  teacher's parameters and the center of its outputs.
  """

  kind = "dino"
  eval_metrics = ("loss", "teacher_entropy")
  value_ranges = (
    (r"local\.count", ranges.integer(0, 64)),
    (
      r"local\.crop_scale",
      ranges.tuple_of(2, ranges.fraction(zero=False), "two numbers in (0, 1]", ascending=True),
    ),
    (r"augment\..*", ranges.tuple_of(3, ranges.fraction(), "three numbers in [0, 1]")),
    (r"loss\.(student_|teacher_|warmup_teacher_)temperature", ranges.number(1e-3, 1e3)),
    (r"loss\.(temperature_warmup|freeze_last_layer)_epochs", ranges.integer(0, 10**6)),
    (r"loss\.(center|teacher)_momentum", ranges.fraction()),
    (r"local\.image_size", ranges.sides(1, 8192)),
  )

  def __init__(self, config: ConfigDict, source: Source, load: Loader | None = None) -> None:
    super().__init__(config, source, load)
    self.module = self.make_module(config.model, self.image_size, 0)
    self._check_encoder()
    if config.optimizer.ema_decay:
      raise UserError(
        "config key 'optimizer.ema_decay': the teacher is the average of the student's weights; set it to 0 and see "
        "loss.teacher_momentum"
      )
    local, data = config.local, config.data
    self.crops = {"global_crops": Crops(NUM_GLOBAL, self.image_size, tuple(data.crop_scale))}
    if local.count:
      size = pair(local.image_size, "local.image_size")
      self._check_local_size(size)
      self.crops["local_crops"] = Crops(local.count, size, tuple(local.crop_scale))
    self.steps_per_epoch = max(len(source) // config.batch_size, 1)
    self.total_steps = max(duration(config, "total", self.steps_per_epoch), 1)

  @classmethod
  def config_section(cls) -> dict[str, Any]:
    head = {name: getattr(Dino, name) for name in ("outputs", "hidden", "bottleneck")}
    return dict(
      model={**encoder_schema(), "preset": "paper", **head},
      local=dict(count=8, image_size=EitherOf((int, tuple), 96), crop_scale=(0.05, 0.4)),
      augment=dict(  # probabilities for the first global view, the second, and the local views
        color_jitter=(0.8, 0.8, 0.8),
        grayscale=(0.2, 0.2, 0.2),
        gaussian_blur=(1.0, 0.1, 0.5),
        solarize=(0.0, 0.2, 0.0),
      ),
      loss=dict(
        student_temperature=0.1,
        teacher_temperature=0.04,
        warmup_teacher_temperature=0.04,  # of the first epoch; rises linearly
        temperature_warmup_epochs=0,
        center_momentum=0.9,
        teacher_momentum=0.996,  # of the first step; rises to 1 along a cosine
        freeze_last_layer_epochs=1,
      ),
    )

  @classmethod
  def make_module(cls, model: ConfigDict, image_size: tuple[int, int], outputs: int) -> Dino:
    del outputs  # a key of the model
    fields = {**encoder_fields(model, image_size, pretrain=True), "use_mask_token": False}
    fields["weight_init"] = "finetune"  # a normal distribution of 0.02, as in the reference
    return Dino(fields, model.outputs, model.hidden, model.bottleneck)

  @classmethod
  def expected_outputs(cls, config: ConfigDict) -> int:
    return int(config.model.outputs)

  def _check_encoder(self) -> None:
    encoder = self.module.encoder
    for key, needed in (("rel_pos", "none"), ("abs_pos", True)):
      if encoder[key] != needed:
        raise UserError(
          f"config key 'model.{key}': {encoder[key]!r}, but views of several sizes need absolute positions: "
          f"{needed!r}, which model.preset='paper' sets"
        )

  def _check_local_size(self, size: tuple[int, int]) -> None:
    patch = self.module.encoder["patch_size"]
    if any(side % patch for side in size):
      near = tuple(max(round(side / patch), 1) * patch for side in size)
      raise UserError(
        f"config key 'local.image_size': {size} is not divisible by model.patch_size={patch}; choose e.g. {near}, or "
        "local.count=0 for no local views"
      )

  # Data.

  def views(self) -> ViewSizes:
    return {name: (crops.size, self.config.data.interpolation) for name, crops in self.crops.items()}

  def reader(self) -> MultiCropReader:
    return MultiCropReader(self.crops, self.config.data.to_dict())

  def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {name: ((c.number, *c.size, self.channels), jnp.uint8) for name, c in self.crops.items()}
    return with_common_arrays(shapes, batch_size)

  def augmented_crops(self, batch: Batch) -> list[Array]:
    """The views in [0, 1] with augmentations: global float32 [B, 2, H, W, C], local [B, n, h, w, C]."""
    result, first = [], 0
    for name, crops in self.crops.items():
      probabilities = {
        key: value[:NUM_GLOBAL] if first == 0 else value[NUM_GLOBAL:] * crops.number
        for key, value in self.config.augment.to_dict().items()
      }
      result.append(
        augment.augment_crops(
          augment.to_float(batch[name]),
          batch["example_key"],
          seed=self.config.seed,
          first=first,
          probabilities=probabilities,
        )
      )
      first += crops.number
    return result

  # Schedules.

  def teacher_temperature(self, step: Any, xp: Any = np) -> Any:
    """Constant within an epoch; rises over the first `temperature_warmup_epochs`."""
    loss = self.config.loss
    epoch, warmup = step // self.steps_per_epoch, loss.temperature_warmup_epochs
    start, end = loss.warmup_teacher_temperature, loss.teacher_temperature
    return xp.where(epoch < warmup, start + (end - start) * epoch / max(warmup - 1, 1), end)

  def teacher_momentum(self, step: Any, xp: Any = np) -> Any:
    """Share of the old value in the teacher's moving average."""
    peak, steps = self.config.loss.teacher_momentum, self.total_steps
    return optim.warmup_cosine(step, peak=peak, end=1.0, warmup_steps=0, total_steps=steps, xp=xp)

  @property
  def delayed(self) -> dict[str, int]:
    epochs = self.config.loss.freeze_last_layer_epochs
    return {"^head/last_layer/": epochs * self.steps_per_epoch} if epochs else {}

  # Steps.

  def _distill(
    self, variables: Variables, batch: Batch, temperature: Any, key: Array | None
  ) -> tuple[dict[str, Metric], PyTree]:
    """(metrics, sums for the center)."""
    data, teacher = self.config.data, variables["teacher"]
    crops = [augment.normalize(views, data.mean, data.std) for views in self.augmented_crops(batch)]
    targets = jax.lax.stop_gradient(self.module.project(teacher["params"], crops[:1]))  # [B, 2, K]
    outputs = self.module.project(variables["params"], crops, key)  # [B, V, K]
    loss, entropy = losses.self_distillation(
      outputs / self.config.loss.student_temperature, (targets - teacher["center"]) / temperature
    )
    valid = batch["valid"].astype(jnp.float32)
    count = valid.sum()
    metrics = {
      "loss": Metric((loss * valid).sum(), count),
      "teacher_entropy": Metric((entropy * valid).sum(), count),
    }
    return metrics, {"outputs": (targets.mean(1) * valid[:, None]).sum(0), "count": count}

  def loss(self, variables: Variables, frozen: PyTree, batch: Batch, key: Array, step: Array) -> LossOutput:
    del frozen
    temperature = self.teacher_temperature(step, jnp)
    metrics, statistics = self._distill(variables, batch, temperature, key)
    count = metrics["loss"].n
    metrics["teacher_temperature"] = Metric(temperature * count, count)
    metrics["teacher_momentum"] = Metric(self.teacher_momentum(step, jnp) * count, count)
    return LossOutput(metrics, statistics=statistics)

  def after_update(
    self, params: PyTree, collections: Variables, statistics: PyTree, step: Array
  ) -> Variables:
    """The teacher follows the student; the center follows the mean of the teacher's outputs."""
    teacher, share = collections["teacher"], self.config.loss.center_momentum
    momentum = self.teacher_momentum(step, jnp)
    mean = statistics["outputs"] / jnp.maximum(statistics["count"], 1.0)
    average = jax.tree.map(lambda t, s: momentum * t + (1.0 - momentum) * s, teacher["params"], params)
    return {"teacher": {"params": average, "center": share * teacher["center"] + (1.0 - share) * mean}}

  def eval_step(self, variables: Variables, frozen: PyTree, batch: Batch) -> EvalOutput:
    del frozen
    return EvalOutput(self._distill(variables, batch, self.config.loss.teacher_temperature, None)[0])

  def figures(self, variables: Variables, frozen: PyTree, batch: Batch) -> dict[str, np.ndarray]:
    """Rows: the views of each image, as the student sees them."""
    del variables, frozen
    rows: dict[str, np.ndarray] = {}
    for name, crops in zip(self.crops, self.augmented_crops(batch), strict=True):
      title = name.removesuffix("_crops")
      rows |= {f"{title} view {i + 1}": np.asarray(crops[:, i]) for i in range(min(crops.shape[1], 2))}
    return {"views": drawing.labeled_rows(rows)}

  # Weights.

  def load_start(self, path: str, *, ema: bool = False) -> Pretrained:
    return weights_dino.load(path, ema=ema)

  def load_collections(self, path: str) -> Variables:
    return self.load_start(path).collections

  def adapt_collections(self, pretrained: Pretrained, params: PyTree, collections: Variables) -> Variables:
    """The teacher of a DINO checkpoint; of any other, a copy of the student."""
    if pretrained.kind != self.kind:
      return {"teacher": {**collections["teacher"], "params": jax.tree.map(jnp.copy, params)}}
    teacher = pretrained.collections["teacher"]
    found = self.adapt(dataclasses.replace(pretrained, params=teacher["params"]), params)
    return {"teacher": {"params": trees.unflatten(found), "center": teacher["center"]}}

  def adapt(self, pretrained: Pretrained, shapes: PyTree) -> dict[str, Any]:
    """The encoder of any backbone; of a DINO checkpoint, the student with its head."""
    found = super().adapt(pretrained, shapes)
    if pretrained.kind != self.kind:
      return found
    missing = [name for name in trees.flatten(shapes) if name not in found]
    if missing:
      raise UserError(
        f"init_from: the head of {pretrained.description.get('path')} does not fit, since {', '.join(missing)} differ; "
        "set model.outputs, model.hidden and model.bottleneck to those of the checkpoint"
      )
    return found
