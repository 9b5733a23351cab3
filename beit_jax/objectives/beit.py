"""Masked image modeling: predict the visual tokens of masked patches (BEiT paper, section 2.3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from beit_jax import augment, losses
from beit_jax.config.parse import duration
from beit_jax.data import drawing, token_cache
from beit_jax.data.images import ViewSizes
from beit_jax.data.sources import Source
from beit_jax.errors import UserError
from beit_jax.models.beit import BeitForMaskedImageModeling
from beit_jax.models.constrain import constrain_batch
from beit_jax.objectives import masked
from beit_jax.objectives.base import (
  Array,
  Batch,
  Loader,
  Metric,
  Metrics,
  Objective,
  PyTree,
  Variables,
)
from beit_jax.objectives.encoder import encoder_fields
from beit_jax.objectives.pixels import PixelRecovery
from beit_jax.runtime.logs import log
from beit_jax.weights.pretrained import Pretrained


class MaskedImageModeling(masked.MaskedObjective):
  """A ViT learns to predict the visual tokens that a frozen tokenizer assigns to the masked patches."""

  kind = "mim"
  eval_metrics: tuple[str, ...] = ("loss", "mim_acc")
  frozen_sections = ("tokenizer",)

  def __init__(self, config: ConfigDict, source: Source, load: Loader | None = None) -> None:
    super().__init__(config, source, load)
    masked.check_unused(config, ("model.normalize_patches",))
    self.tokenizer = self._load_tokenizer(config.tokenizer.init_from)
    self._tokenizer: Any = self.tokenizer.module
    self.module = self.make_module(config.model, self.image_size, self.tokenizer.module.vocab_size)
    self._check_aggregation()
    self._check_token_grid()
    self.prepare_masks()
    self.cache = None
    if config.tokenizer.cache and not config.eval_only and load is None:
      steps = duration(config, "total", len(source) // config.batch_size)
      num_examples = steps * config.batch_size
      self.cache = token_cache.open_for_run(config.tokenizer.cache, self.token_key(), num_examples)
      log.info("tokens from %s, %d epochs", self.cache.folder, self.cache.epochs)

  @classmethod
  def variant(cls, config: ConfigDict) -> type[Objective]:
    return PixelRecovery if config.target == "pixels" else cls

  @classmethod
  def make_module(
    cls, model: ConfigDict, image_size: tuple[int, int], outputs: int
  ) -> BeitForMaskedImageModeling:
    encoder = encoder_fields(model, image_size, pretrain=True)
    return BeitForMaskedImageModeling(
      encoder, outputs, model.early_block, model.head_blocks, model.shared_lm_head
    )

  @classmethod
  def expected_outputs(cls, config: ConfigDict) -> int:
    return config.model.vocab_size or 8192

  def _check_aggregation(self) -> None:
    """Checks patch aggregation; with it there are two losses and their sum."""
    model, depth = self.config.model, self.depth
    if not model.head_blocks and not model.early_block:
      return
    if not model.head_blocks or not 1 <= model.early_block <= depth:
      raise UserError(
        f"config key 'model.early_block': {model.early_block} with model.head_blocks={model.head_blocks}; patch "
        f"aggregation needs an early block from 1 to {depth} (BEiT v2: 9 of 12, 21 of 24) and one or more head blocks "
        "(BEiT v2: 2); without it both are 0"
      )
    if self.config.recover == "all":
      raise UserError(
        f"config key 'recover': 'all' with model.head_blocks={model.head_blocks}; patch aggregation predicts masked "
        "patches only; set recover='masked', or model.head_blocks=0 and model.early_block=0"
      )
    self.eval_metrics = (*self.eval_metrics, "head_loss", "head_acc")

  def _load_tokenizer(self, path: str) -> Pretrained:
    if not path or path.startswith("stage:"):
      raise UserError(
        f"config key 'tokenizer.init_from': {path!r} is no tokenizer; give the folder of a `dvae` or `vqkd` run "
        "(configs/dvae.py and configs/vqkd.py train one)"
      )
    tokenizer = self.load_frozen(path)
    if not tokenizer.can_tokenize:
      raise UserError(f"config key 'tokenizer.init_from': {path} holds a {tokenizer.kind}, not a tokenizer")
    channels, vocab_size = tokenizer.module.in_channels, tokenizer.module.vocab_size
    if channels != self.channels:
      raise UserError(
        f"config key 'tokenizer.init_from': the tokenizer {path} takes images of {channels} channels, this run has "
        f"{self.channels}; train one with configs/dvae.py and model.in_channels={self.channels}"
      )
    if self.config.model.vocab_size not in (None, vocab_size):
      raise UserError(
        f"config key 'model.vocab_size': {self.config.model.vocab_size}, but the tokenizer {path} has {vocab_size} "
        "words"
      )
    if self.config.tokenizer.dtype is None:
      return tokenizer
    return dataclasses.replace(tokenizer, module=tokenizer.module.with_dtype(self.config.tokenizer.dtype))

  def _check_token_grid(self) -> None:
    """The tokenizer must give one token for each patch."""
    stride, only_size = self.tokenizer.module.stride, self.tokenizer.token_image_size
    token_grid = tuple(side // stride for side in self.token_image_size)
    if token_grid != self.grid_size or any(side % stride for side in self.token_image_size):
      expected = tuple(n * stride for n in self.grid_size)
      raise UserError(
        f"config key 'data.token_image_size': {self.token_image_size} gives {token_grid} tokens (stride {stride}), "
        f"the encoder has {self.grid_size} patches; set it to {expected}"
      )
    if only_size not in (None, self.token_image_size):
      raise UserError(
        f"config key 'data.token_image_size': {self.token_image_size}, but the tokenizer "
        f"{self.config.tokenizer.init_from} was built for images of {only_size}"
      )

  def views(self) -> ViewSizes:
    token_view = (self.token_image_size, self.config.data.token_interpolation)
    return {**super().views(), "token_image": token_view}

  def reader(self) -> Any:
    if self.cache is None:
      return super().reader()
    return token_cache.CachedTokenReader(self.views(), self.config.data.to_dict(), self.cache)

  def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = super().batch_shapes(batch_size)
    if self.config.tokenizer.cache:
      del shapes["token_image"]
      num_patches = self.grid_size[0] * self.grid_size[1]
      shapes["targets"] = jax.ShapeDtypeStruct((batch_size, num_patches), jnp.uint16)
    return shapes

  def token_key(self) -> dict[str, Any]:
    """What the tokens of a training batch depend on; see `token_cache.cache_key`."""
    num_tokens = self.grid_size[0] * self.grid_size[1]
    return token_cache.cache_key(
      self.config,
      self.tokenizer,
      num_tokens,
      self.source,
      augmentations=self.augmentations,
      platform=jax.default_backend(),
    )

  def frozen_params(self, mesh: jax.sharding.Mesh) -> PyTree:
    del mesh
    if self.cache is not None and not self.config.eval.split and not self.config.figures:
      return {}
    # Only figures decode. They bring the decoder, so that it does not take memory on the devices all the time.
    decoders = ("decoder", self.tokenizer.spec.pixel_decoder)
    params = {name: leaf for name, leaf in self.tokenizer.params.items() if name not in decoders}
    return {"params": params, **self.tokenizer.collections}

  def tokenize(self, frozen: PyTree, batch: Batch) -> Array:
    """The targets of a training batch: int32 [B, N]. Pure."""
    return self._tokens(frozen, self.pixels(batch, train=True)["token_image"])

  def _tokens(self, frozen: PyTree, token_image: Array) -> Array:
    ids = self._tokenizer.apply(frozen, token_image, method="tokenize")
    return jax.lax.stop_gradient(ids)

  def _inputs(self, frozen: PyTree, batch: Batch, *, train: bool) -> tuple[Array, Array, Array]:
    """(normalized images [B, H, W, 3], masks bool [B, h, w], targets int32 [B, N])."""
    views = self.pixels(batch, train=train)
    if "targets" in batch:  # from the token cache
      targets = batch["targets"].astype(jnp.int32)
    else:
      targets = self._tokens(frozen, views["token_image"])
    return self.normalized(views["image"]), self.masks(batch), targets

  def loss_metrics(
    self, variables: Variables, frozen: PyTree, batch: Batch, *, train: bool, rngs: dict[str, Array] | None
  ) -> Metrics:
    image, mask, targets = self._inputs(frozen, batch, train=train)
    slots, weight = self.slots(mask, batch["valid"])
    options = dict(slots=slots, train=train, rngs=rngs, aggregated=self.module.head_blocks > 0)
    logits = self.module.apply(variables, image, mask, **options)
    targets = constrain_batch(masked.take(targets, slots))

    def measure(logits: Array) -> tuple[Metric, Metric]:
      loss, correct, count = losses.masked_cross_entropy(logits, targets, weight)
      return Metric(loss, count), Metric(correct, count)

    if not self.module.head_blocks:
      loss, accuracy = measure(logits)
      return {"loss": loss, "mim_acc": accuracy}
    (main, accuracy), (head, head_accuracy) = map(measure, logits)
    loss = Metric(main.total + head.total, main.n)
    return {"loss": loss, "mim_acc": accuracy, "head_loss": head, "head_acc": head_accuracy}

  def figures(self, variables: Variables, frozen: PyTree, batch: Batch) -> dict[str, np.ndarray]:
    """Rows: the image, what the encoder sees of it, and the predicted and true tokens, both decoded to pixels."""
    image, mask, targets = self._inputs(frozen, batch, train=False)
    logits = self.module.apply(variables, image, mask)
    recovered = self.recovered(mask).reshape(len(mask), -1)
    predicted = jnp.where(recovered, logits.argmax(-1), targets)

    def decode(ids: Array) -> Array:
      return self._tokenizer.apply(self.tokenizer.variables, ids, self.grid_size, method="decode")

    visible = np.asarray(augment.to_float(batch["image"]))
    rows: dict[str, Any] = {
      "image": visible,
      "masked": drawing.gray_out(visible, np.asarray(mask)),
    }
    if self.tokenizer.can_decode:
      rows |= {"predicted tokens, decoded": decode(predicted), "true tokens, decoded": decode(targets)}
    else:
      log.info("figures: tokens are not drawn, %s", self.tokenizer.spec.without_pixel_decoder)
    return {"masked_image_modelling": drawing.labeled_rows({k: np.asarray(v) for k, v in rows.items()})}

  def describe(self) -> dict[str, Any]:
    tokenizer = self.tokenizer.description
    facts = dict(path=tokenizer.get("path"), sha256=tokenizer.get("sha256"))
    return {**super().describe(), "tokenizer": facts}
