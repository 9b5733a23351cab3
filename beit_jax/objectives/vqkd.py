"""Tokenizer training of BEiT v2: vector-quantized knowledge distillation (arXiv 2208.06366, section 2.2)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from beit_jax import augment, losses
from beit_jax.config import ranges
from beit_jax.config.defaults import OptionalOf
from beit_jax.config.parse import pair
from beit_jax.data import drawing
from beit_jax.data.images import ViewSizes
from beit_jax.data.sources import Source
from beit_jax.errors import UserError
from beit_jax.models import vqkd
from beit_jax.models.beit import Beit
from beit_jax.models.vqkd import Vqkd
from beit_jax.objectives import base, codebook
from beit_jax.objectives.base import Array, Batch, EvalOutput, Loader, LossOutput, Metric, PyTree, Variables
from beit_jax.objectives.encoder import SHARED_FIELDS, encoder_fields, encoder_schema
from beit_jax.runtime.logs import log
from beit_jax.weights.kinds import KINDS
from beit_jax.weights.pretrained import Pretrained

TEACHER_DIM = 768  # where a plan does not know the teacher


class VqkdTraining(codebook.CodebookObjective):
  """Image -> visual tokens -> the features that a frozen teacher has of the image.

  loss = 1 - cosine of predicted and teacher's features (mean over patches) + commitment * squared distance of the
  encoder's outputs to their words (mean over patches and channels), both on the unit sphere. The words follow the
  outputs assigned to them by moving averages of the global batch, once for each update.

  With `model.pixel_depth` a second decoder learns pixels from the tokens: the loss gets the mean squared error of
  pixels in [-1, 1], whose gradient reaches nothing else. Without a teacher the tokenizer of `init_from` stays as it is,
  and only that decoder is trained.

  References: unilm `beit2/modeling_vqkd.py`, `beit2/norm_ema_quantizer.py`; what differs is in docs/conflicts.md.
  """

  kind = "vqkd"
  eval_metrics: tuple[str, ...] = (
    "loss",
    "distillation_loss",
    "commitment_loss",
    "codebook_usage",
    "perplexity",
  )
  augmentations = augment.ON_PIXELS
  frozen_sections = ("teacher",)
  collapse_advice = "Lower optimizer.learning_rate, or set codebook.kmeans or codebook.replace_below"
  value_ranges = (
    (r"codebook\.decay", ranges.fraction(one=False)),
    (r"codebook\.commitment", ranges.number(0)),
    (r"codebook\.replace_below", ranges.fraction(one=False)),
    *codebook.RANGES,
  )

  def __init__(self, config: ConfigDict, source: Source, load: Loader | None = None) -> None:
    super().__init__(config, source, load)
    self.check_token_image_size(config.model.patch_size, "model.patch_size")
    grid = tuple(side // config.model.patch_size for side in self.token_image_size)
    self.teacher = self._load_teacher(config.teacher.init_from, grid) if config.teacher.init_from else None
    found = self.teacher.encoder_fields["width"] if self.teacher else None
    expected = config.model.teacher_dim
    if found and expected not in (None, found):
      raise UserError(
        f"config key 'model.teacher_dim': {expected}, but the teacher's features have {found} numbers"
      )
    self.module = _make_module(config, self.token_image_size, expected or found or TEACHER_DIM)
    if self.teacher is None:
      self._check_pixels_only()
      self.eval_metrics = ("loss", "codebook_usage", "perplexity")
    else:
      self._teacher, self._teacher_params = _encoder(self.teacher, config.model)
      self.collections_from_batch = self._cluster if config.codebook.kmeans else None
    if config.model.pixel_depth:
      self.eval_metrics = (*self.eval_metrics, "pixel_loss", "mae")

  @classmethod
  def variant(cls, config: ConfigDict) -> type[base.Objective]:
    decoder_only = config.model.pixel_depth and not config.teacher.init_from
    return PixelDecoderTraining if decoder_only else cls

  @classmethod
  def config_section(cls) -> dict[str, Any]:
    own = base.module_fields(Vqkd, without=("encoder",))
    return dict(
      model={
        **encoder_schema(),
        "preset": "paper",
        **own,
        "teacher_dim": OptionalOf(int),
      },  # None = the teacher's width
      # The frozen model: what `beit_jax.load` reads and has an encoder, or "stage:NAME"; "" = train pixel_decoder only
      teacher=dict(init_from=""),
      codebook=dict(
        decay=0.99,  # of the moving averages, for each update
        commitment=1.0,  # weight of that loss
        kmeans=True,  # the first words are centers of clusters of the first batch; otherwise random
        replace_below=0.0,  # words used less than this share of the mean move beside frequent ones; 0 = never
      ),
      collapse=codebook.SECTION,
    )

  @classmethod
  def expected_result(cls, config: ConfigDict) -> Pretrained:
    size = pair(config.data.token_image_size, "data.token_image_size")
    module = _make_module(config, size, config.model.teacher_dim or TEACHER_DIM)
    return base.abstract_model(cls.kind, module, size, _preprocessing(config.data))

  @property
  def depth(self) -> int:
    return self.module.encoder["depth"]

  def _load_teacher(self, path: str, grid: tuple[int, ...]) -> Pretrained:
    key = "config key 'teacher.init_from'"
    if path.startswith("stage:"):
      raise UserError(f"{key}: {path!r} names a stage, but this config has none; give the path of a model")
    teacher = self.load_frozen(path)
    if teacher.can_tokenize or not teacher.has_encoder:
      raise UserError(
        f"{key}: {path} holds a {teacher.kind}, which has no features to learn; give a backbone such as DINO, CLIP's "
        "vision tower, or the run of a `beit` or `classify` objective"
      )
    fields = teacher.encoder_fields
    patch, size = fields["patch_size"], tuple(fields["image_size"])
    found = tuple(side // patch for side in size)
    if found != grid:
      expected = tuple(side * self.config.model.patch_size for side in found)
      raise UserError(
        f"{key}: {path} has {found} patches ({size} pixels, patches of {patch}), but the tokenizer has {grid} tokens; "
        f"set data.token_image_size to {expected}, change model.patch_size, or give another teacher"
      )
    if fields["in_channels"] != self.channels:
      raise UserError(
        f"{key}: {path} takes images of {fields['in_channels']} channels, this run has {self.channels}"
      )
    return teacher

  def _check_pixels_only(self) -> None:
    """Raises a UserError if there is no teacher and the run would do anything but train the decoder to pixels."""
    config, optimizer = self.config, self.config.optimizer
    if not config.model.pixel_depth or not (config.init_from or config.eval_only):
      raise UserError(
        "config key 'teacher.init_from': no teacher; give one, or set init_from (a trained tokenizer) and "
        "model.pixel_depth to train a decoder to pixels for it"
      )
    if optimizer.weight_decay or optimizer.weight_decay_end:
      raise UserError(
        f"config key 'optimizer.weight_decay': {optimizer.weight_decay} would change the tokenizer, which stays as it "
        "is without a teacher; set it to 0"
      )

  def views(self) -> ViewSizes:
    size = tuple(self.teacher.encoder_fields["image_size"]) if self.teacher else self.token_image_size
    interpolation = self.config.data.token_interpolation
    other = {} if size == self.token_image_size else {"teacher_image": ((size[0], size[1]), interpolation)}
    return {**super().views(), **other}

  def frozen_params(self, mesh: jax.sharding.Mesh) -> PyTree:
    del mesh
    return {"teacher": self._teacher_params} if self.teacher else {}

  def _pixels(self, batch: Batch, *, train: bool) -> dict[str, Array]:
    """The views in a batch, float32 [B, H, W, 3] in [0, 1]."""
    views = {name: augment.to_float(batch[name]) for name in self.views()}
    return self.augmented(views, batch) if train else views

  def teacher_features(self, frozen: PyTree, views: dict[str, Array]) -> Array:
    """The teacher's features of all patches, float32 [B, N, F], of pixels in [0, 1]."""
    assert self.teacher is not None
    preprocessing = self.teacher.preprocessing
    image = views.get("teacher_image", views["token_image"])
    image = augment.normalize(image, preprocessing["mean"], preprocessing["std"])
    with jax.named_scope("teacher"):  # the name under which a plan counts it
      tokens, _ = self._teacher.apply({"params": frozen["teacher"]}, image)
    return jax.lax.stop_gradient(tokens[:, 1:].astype(jnp.float32))

  def _losses(self, out: dict[str, Array], frozen: PyTree, views: dict[str, Array]) -> dict[str, Array]:
    """The loss of each example, and what it consists of: name -> float32 [B]."""
    parts: dict[str, Array] = {}
    if self.teacher:
      target = self.teacher_features(frozen, views)
      parts["distillation_loss"] = losses.cosine_distance(out["features"], target).mean(1)
      parts["commitment_loss"] = vqkd.commitment(out["z"], out["codes"]).mean(1)
    weights = {"commitment_loss": self.config.codebook.commitment}
    if "pixels" in out:
      error = out["pixels"] - views["token_image"]
      parts["pixel_loss"] = ((error / vqkd.STD) ** 2).mean((1, 2, 3))
      weights["mae"] = 0.0
      clipped = jnp.clip(jax.lax.stop_gradient(out["pixels"]), 0, 1)
      parts["mae"] = jnp.abs(clipped - views["token_image"]).mean((1, 2, 3))
    total = jnp.asarray(sum(weights.get(name, 1.0) * value for name, value in parts.items()))
    return {"loss": total, **parts}

  def loss(self, variables: Variables, frozen: PyTree, batch: Batch, key: Array, step: Array) -> LossOutput:
    del step
    views = self._pixels(batch, train=True)
    image = vqkd.normalize(views["token_image"])
    # Without a teacher the tokenizer is not trained, and has the tokens of inference.
    out = self.module.apply(variables, image, train=self.teacher is not None, rngs={"drop_path": key})
    count = jnp.asarray(len(image), jnp.float32)
    metrics = {name: Metric(part.sum(), count) for name, part in self._losses(out, frozen, views).items()}
    counts, sums = vqkd.code_sums(jax.lax.stop_gradient(out["z"]), out["ids"], self.module.vocab_size)
    return LossOutput(metrics, statistics={"counts": counts, "sums": sums})

  def after_update(
    self, params: PyTree, collections: Variables, statistics: PyTree, step: Array
  ) -> Variables:
    del params
    if self.teacher is None:
      return collections
    options, old = self.config.codebook, collections["codebook"]
    new = vqkd.update_codebook(old, statistics["counts"], statistics["sums"], options.decay)
    new["initialized"] = jnp.ones_like(old["initialized"])
    if options.replace_below:
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), 8), step)
      replaced = vqkd.replace_unused(new, options.replace_below, key)
      is_known = step * (1 - options.decay) >= 1  # before that, the averages are of few batches
      new = jax.tree.map(lambda moved, kept: jnp.where(is_known, moved, kept), replaced, new)
    return {"codebook": new}

  def _cluster(self, variables: Variables, frozen: PyTree, batch: Batch) -> Variables:
    """The collections with words that are the centers of clusters of a batch; in parts that fit into memory."""
    del frozen
    image = vqkd.normalize(self._pixels(batch, train=True)["token_image"])
    parts = jnp.moveaxis(image.reshape(-1, self.config.microbatches, *image.shape[1:]), 1, 0)
    codes = jax.lax.map(lambda part: self.module.apply(variables, part, method="encode"), parts)
    codes = vqkd.l2_normalize(jnp.moveaxis(codes, 0, 1).reshape(-1, self.module.code_dim))
    key = jax.random.fold_in(jax.random.key(self.config.seed), 9)
    return {"codebook": vqkd.initial_codebook(variables["codebook"], codes, key)}

  def eval_step(self, variables: Variables, frozen: PyTree, batch: Batch) -> EvalOutput:
    views, valid = self._pixels(batch, train=False), batch["valid"].astype(jnp.float32)
    out = self.module.apply(variables, vqkd.normalize(views["token_image"]))
    parts = self._losses(out, frozen, views)
    sums = {name: Metric((part * valid).sum(), valid.sum()) for name, part in parts.items()}
    words = jax.nn.one_hot(out["ids"], self.module.vocab_size).sum(1)  # [B, V]
    return EvalOutput({**sums, "token_counts": Metric((words * valid[:, None]).sum(0), valid.sum())})

  def figures(self, variables: Variables, frozen: PyTree, batch: Batch) -> dict[str, np.ndarray]:
    """Rows: image, what the decoder to pixels makes of its tokens."""
    if not self.config.model.pixel_depth:
      log.info("figures: none, %s", KINDS[self.kind].without_pixel_decoder)
      return {}
    image = augment.to_float(batch["token_image"])
    ids = self.module.apply(variables, image, method="tokenize")
    decoded = self.module.apply(variables, ids, self.module.grid_size, method="decode")
    rows = {"image": np.asarray(image), "from its tokens": np.asarray(decoded)}
    return {"reconstructions": drawing.labeled_rows(rows)}

  def adapt(self, pretrained: Pretrained, shapes: PyTree) -> dict[str, Any]:
    if pretrained.kind != self.kind:
      return super().adapt(pretrained, shapes)  # refuses it
    found, expected = (
      {**base.field_values(module), **module.encoder} for module in (pretrained.module, self.module)
    )
    for key in ("vocab_size", "code_dim", "decoder_depth", "teacher_dim", *SHARED_FIELDS):
      if found.get(key, expected[key]) != expected[key]:
        raise UserError(
          f"config key 'model.{key}': {expected[key]}, but the tokenizer of init_from has {found[key]}"
        )
    if not pretrained.can_decode:  # a decoder to pixels may be new
      shapes = {name: part for name, part in shapes.items() if not name.startswith("pixel_")}
    return super().adapt(pretrained, shapes)

  def adapt_collections(self, pretrained: Pretrained, params: PyTree, collections: Variables) -> Variables:
    del params, collections
    return pretrained.collections

  def load_collections(self, path: str) -> Variables:
    return self.load_frozen(path).collections

  def describe(self) -> dict[str, Any]:
    preprocessing = {**_preprocessing(self.config.data), "image_size": self.token_image_size}
    teacher = self.teacher.description if self.teacher else {}
    facts = dict(path=teacher.get("path"), sha256=teacher.get("sha256"))
    module = base.field_values(self.module)
    return dict(kind=self.kind, module=module, preprocessing=preprocessing, teacher=facts)


class PixelDecoderTraining(VqkdTraining):
  """Trains the decoder to pixels of the tokenizer that `init_from` names."""

  import_replaces_run = False


def _make_module(config: ConfigDict, size: tuple[int, int], teacher_dim: int) -> Vqkd:
  model = config.model
  own = {name: model[name] for name in base.module_fields(Vqkd, without=("encoder", "teacher_dim"))}
  return Vqkd(encoder_fields(model, size, pretrain=True), teacher_dim=teacher_dim, **own)


def _encoder(teacher: Pretrained, model: ConfigDict) -> tuple[Any, PyTree]:
  """The teacher's encoder as a module that ends in a norm, and its parameters."""
  params = {name: part for name, part in teacher.encoder_params.items() if name != "mask_token"}
  if "fc_norm" in teacher.head_params:  # of a classifier that averages the patches
    params["norm"] = teacher.head_params["fc_norm"]
  fields = dict(use_mask_token=False, final_norm="norm" in params, drop_path_rate=0.0, remat=False)
  fields |= {name: model[name] for name in ("dtype", "residual_dtype")}
  return Beit(**{**teacher.encoder_fields, **fields}), params


def _preprocessing(data: ConfigDict) -> dict[str, Any]:
  return dict(
    mean=(vqkd.MEAN,) * len(data.mean),
    std=(vqkd.STD,) * len(data.mean),
    crop_pct=data.crop_pct,
    interpolation=data.token_interpolation,
    resize="short_side",
    **base.value_range(data),
  )
