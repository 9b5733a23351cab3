"""Masked image modelling: predict the visual tokens of masked patches (BEiT paper, section 2.3)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import augment, losses, masking
from beit_jax.config.parse import OptionalOf, duration
from beit_jax.data import drawing
from beit_jax.data import token_cache as tokens
from beit_jax.errors import UserError
from beit_jax.models.beit import BeitForMaskedImageModeling, masked_slots
from beit_jax.objectives import base
from beit_jax.objectives import encoder as encoder_keys
from beit_jax.runtime import sharding
from beit_jax.runtime.logs import log


class MaskedImageModeling(base.Objective):
  """A ViT learns the tokens that a frozen tokenizer gives to the patches it cannot see."""

  kind = "mim"
  eval_metrics = ("loss", "mim_acc")
  augmentations = ("color_jitter",)

  def __init__(self, config, source, load=None):
    super().__init__(config, source, load)
    path = config.tokenizer.init_from
    if not path or path.startswith("stage:"):
      raise UserError(
        f"config key 'tokenizer.init_from': {path!r} is no tokenizer; give the folder of a `dvae` run "
        "(configs/dvae.py trains one)"
      )
    self.tokenizer = self.load_frozen(path)
    if self.tokenizer.kind != "tokenizer":
      raise UserError(
        f"config key 'tokenizer.init_from': {path} holds a {self.tokenizer.kind}, not a tokenizer"
      )
    vocab_size = self.tokenizer.module.vocab_size
    if config.model.vocab_size not in (None, vocab_size):
      raise UserError(
        f"config key 'model.vocab_size': {config.model.vocab_size}, but the tokenizer {path} has {vocab_size} words"
      )
    encoder = encoder_keys.encoder_fields(config.model, self.image_size, pretrain=True)
    self.module = BeitForMaskedImageModeling(encoder, vocab_size)
    self.grid_size = tuple(side // encoder["patch_size"] for side in self.image_size)
    stride = self.tokenizer.module.stride
    token_grid = tuple(side // stride for side in self.token_image_size)
    if token_grid != self.grid_size or any(side % stride for side in self.token_image_size):
      wanted = tuple(n * stride for n in self.grid_size)
      raise UserError(
        f"config key 'data.token_image_size': {self.token_image_size} gives {token_grid} tokens (stride {stride}), "
        f"the encoder has {self.grid_size} patches; set it to {wanted}"
      )
    self._sample_mask = self._make_sampler()
    self.cache = None
    if config.tokenizer.cache and not config.eval_only and load is None:
      steps = duration(config, "total", len(source) // config.batch_size)
      self.cache = tokens.open_for_run(config.tokenizer.cache, self.token_key(), steps * config.batch_size)
      log.info("tokens from %s, %d epochs", self.cache.folder, self.cache.epochs)

  @classmethod
  def model_fields(cls):
    return {**encoder_keys.encoder_schema(), "vocab_size": OptionalOf(int)}

  @property
  def depth(self):
    return self.module.encoder["depth"]

  def _make_sampler(self):
    mask = self.config.mask
    num_patches = self.grid_size[0] * self.grid_size[1]
    if mask.kind not in masking.MASKS:
      raise UserError(f"config key 'mask.kind': {mask.kind!r} is unknown; there are {sorted(masking.MASKS)}")
    if not 0 < mask.num_masked <= num_patches:
      raise UserError(
        f"config key 'mask.num_masked': {mask.num_masked} must lie in [1, {num_patches}] for {self.grid_size} patches; "
        f"the paper masks about 40 %, here {round(0.383 * num_patches)}"
      )
    options = {}
    if mask.kind != "random":
      if not 0 < mask.min_aspect <= 1:
        raise UserError(f"config key 'mask.min_aspect': {mask.min_aspect} must lie in (0, 1]")
      names = ("min_block_patches", "max_block_patches", "min_aspect")
      options = {name: mask[name] for name in names}
    if mask.kind == "block_at_most":
      chance = masking.chance_of_empty(self.grid_size, mask.num_masked, **options)
      if chance > 1e-6:
        raise UserError(
          f"config key 'mask.min_block_patches': with {mask.min_block_patches} and num_masked={mask.num_masked} on "
          f"{self.grid_size} patches a mask is empty with probability {chance:.2g}; lower min_block_patches or "
          "use mask.kind='block'"
        )
    sampler = masking.MASKS[mask.kind]
    sample = jax.vmap(lambda key: sampler(key, self.grid_size, mask.num_masked, **options))
    return sharding.by_rows(sample)

  def views(self):
    data = self.config.data
    return {
      "image": (self.image_size, data.interpolation),
      "token_image": (self.token_image_size, data.token_interpolation),
    }

  def reader(self):
    whole = super().reader()
    return (
      whole
      if self.cache is None
      else tokens.CachedTokenReader(self.views(), self.config.data.to_dict(), self.cache)
    )

  def token_key(self) -> dict[str, Any]:
    """See `tokens.cache_key`."""
    num_tokens = self.grid_size[0] * self.grid_size[1]
    return tokens.cache_key(self.config, self.tokenizer, num_tokens, self.source)

  def init(self, key):
    with base.building():
      return self.module.init(key, jnp.zeros((1, *self.image_size, 3)))

  def frozen_params(self, mesh):
    evaluates = self.config.eval.split or self.config.figures
    return {} if self.cache is not None and not evaluates else self.tokenizer.params

  def _pixels(self, batch, *, train):
    """The views of a batch, float32 in [0, 1], in training jittered alike: {name: [B, H, W, 3]}."""
    jitter, views = self.config.data.color_jitter, self.views()
    views = {name: augment.to_float(batch[name]) for name in views if name in batch}
    if train and jitter:
      keys = augment.example_keys(self.config.seed, batch["example_key"], "jitter")
      views = dict(zip(views, augment.color_jitter(keys, list(views.values()), jitter), strict=True))
    return views

  def _tokens(self, frozen, views):
    ids = self.tokenizer.module.apply({"params": frozen}, views["token_image"], method="tokenize")
    return jax.lax.stop_gradient(ids)

  def tokenize(self, frozen: Any, batch: Any) -> jax.Array:
    """The targets of a training batch: int32 [B, N]. Pure."""
    return self._tokens(frozen, self._pixels(batch, train=True))

  def _inputs(self, frozen, batch, *, train):
    """(normalised image [B, H, W, 3], mask bool [B, h, w], targets int32 [B, N], from the batch where it has them)."""
    data = self.config.data
    views = self._pixels(batch, train=train)
    mask = self._sample_mask(augment.example_keys(self.config.seed, batch["example_key"], "mask"))
    targets = batch["targets"].astype(jnp.int32) if "targets" in batch else self._tokens(frozen, views)
    return augment.normalize(views["image"], data.mean, data.std), mask, targets

  def _sums(self, variables, frozen, batch, *, train, rngs=None):
    image, mask, targets = self._inputs(frozen, batch, train=train)
    slots, weight = masked_slots(mask, self.config.mask.num_masked)
    logits = self.module.apply(variables, image, mask, slots=slots, train=train, rngs=rngs)
    weight = weight * batch["valid"][:, None]
    loss, correct, count = losses.masked_cross_entropy(logits, jnp.take_along_axis(targets, slots, 1), weight)
    return {"loss": (loss, count), "mim_acc": (correct, count)}

  def loss(self, variables, frozen, batch, key, step):
    del step
    sums = self._sums(variables, frozen, batch, train=True, rngs={"drop_path": key})
    return sums["loss"][0], (sums, {})

  def eval_step(self, variables, frozen, batch):
    return self._sums(variables, frozen, batch, train=False)

  def figures(self, variables, frozen, batch):
    """Rows: image, what the encoder sees, its prediction and the true tokens, both decoded."""
    image, mask, targets = self._inputs(frozen, batch, train=False)
    logits = self.module.apply(variables, image, mask)
    predicted = jnp.where(mask.reshape(len(mask), -1), logits.argmax(-1), targets)

    def decode(ids):
      module = self.tokenizer.module
      return module.apply({"params": frozen}, ids, self.grid_size, method="decode")

    rows = {
      "image": augment.to_float(batch["image"]),
      "masked": drawing.hide(augment.to_float(batch["image"]), mask),
      "predicted tokens, decoded": decode(predicted),
      "true tokens, decoded": decode(targets),
    }
    return {"masked_image_modelling": drawing.table({k: np.asarray(v) for k, v in rows.items()})}

  def adapt(self, pretrained, shapes):
    return encoder_keys.adapt_encoder(self, pretrained, shapes, log.info)

  def describe(self) -> dict[str, Any]:
    tokenizer = self.tokenizer.description
    return dict(
      kind=self.kind,
      module=dict(encoder=self.module.encoder, vocab_size=self.module.vocab_size),
      preprocessing=self.image_preprocessing(),
      tokenizer=dict(path=tokenizer.get("path"), sha256=tokenizer.get("sha256")),
    )
