"""Tokenizer training: the discrete VAE of the DALL-E paper (section 2.1 and appendix A.2)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from beit_jax import augment, losses
from beit_jax.config import ranges
from beit_jax.config.parse import pair
from beit_jax.data import drawing
from beit_jax.data.sources import Source
from beit_jax.models.dvae import Dvae, map_pixels, unmap_pixels
from beit_jax.objectives import base, codebook
from beit_jax.objectives.base import Array, Batch, EvalOutput, Loader, LossOutput, Metric, PyTree, Variables
from beit_jax.weights.pretrained import Pretrained


class TokenizerTraining(codebook.CodebookObjective):
  """Image -> tokens -> image under a Gumbel-softmax relaxation with a falling temperature.

  loss = reconstruction (mean over pixels and channels) + kl_weight * KL(q || uniform) (mean over tokens, in nats).
  Evaluation uses hard tokens (argmax) and measures errors of pixels in [0, 1].
  """

  kind = "tokenizer"
  eval_metrics = ("loss", "mae", "mse", "codebook_usage", "perplexity")
  augmentations = augment.ON_PIXELS
  collapse_advice = "Lower optimizer.learning_rate or loss.kl_weight, or raise loss.temperature_end"
  value_ranges = (
    (r"loss\.reconstruction", ranges.one_of("logit_laplace", "l1", "l2")),
    (r"loss\.kl_weight", ranges.number(0)),
    (r"loss\.(kl_warmup|temperature)_steps", ranges.integer(0, ranges.MAX_STEPS)),
    (r"loss\.temperature(_end)?", ranges.number(1e-4, 1e4)),
    *codebook.RANGES,
  )

  def __init__(self, config: ConfigDict, source: Source, load: Loader | None = None) -> None:
    super().__init__(config, source, load)
    self.module = Dvae(**dict(config.model))
    self.check_token_image_size(self.module.stride, "2 ** (model.group_count - 1)")

  @classmethod
  def config_section(cls) -> dict[str, Any]:
    return dict(
      model=base.module_fields(Dvae),
      loss=dict(
        reconstruction="logit_laplace",  # "logit_laplace" | "l1" | "l2"
        kl_weight=6.6 / 192,  # of the mean KL per token against the mean loss per pixel, at 112/14 geometry
        kl_warmup_steps=5000,
        temperature=1.0,
        temperature_end=1 / 16,
        temperature_steps=150_000,  # cosine
        straight_through=False,
      ),
      collapse=codebook.SECTION,
    )

  @classmethod
  def expected_result(cls, config: ConfigDict) -> Pretrained:
    size = pair(config.data.token_image_size, "data.token_image_size")
    return base.abstract_model(cls.kind, Dvae(**dict(config.model)), size, _preprocessing(config.data))

  def schedules(self, step: Array) -> tuple[Array, Array]:
    """(temperature, KL weight) at `step`: cosine annealing, and a linear rise from 0."""
    loss = self.config.loss
    done = jnp.minimum(step / max(loss.temperature_steps, 1), 1.0)
    temperature = loss.temperature_end + (loss.temperature - loss.temperature_end) * 0.5 * (
      1 + jnp.cos(jnp.pi * done)
    )
    return temperature, loss.kl_weight * jnp.minimum(step / max(loss.kl_warmup_steps, 1), 1.0)

  def _reconstruction(self, mean: Array, log_scale: Array, target: Array) -> Array:
    """Loss per element, [B, H, W, C]; `target` is map_pixels'd."""
    if self.config.loss.reconstruction == "logit_laplace":
      return losses.logit_laplace(mean, log_scale, target)
    difference = jax.nn.sigmoid(mean) - target
    return jnp.abs(difference) if self.config.loss.reconstruction == "l1" else difference**2

  def loss(self, variables: Variables, frozen: PyTree, batch: Batch, key: Array, step: Array) -> LossOutput:
    del frozen
    views = self.augmented({"image": augment.to_float(batch["token_image"])}, batch)
    image = views["image"]
    target = map_pixels(image)
    temperature, kl_weight = self.schedules(step)
    straight_through = self.config.loss.straight_through
    out = self.module.apply(
      variables, target, temperature=temperature, straight_through=straight_through, key=key
    )
    reconstruction = self._reconstruction(out["mean"], out["log_scale"], target).mean((1, 2, 3))  # [B]
    kl = losses.kl_to_uniform(out["logits"]).mean((1, 2))  # [B]
    loss = reconstruction + kl_weight * kl
    count = jnp.asarray(len(image), jnp.float32)
    mae = jnp.abs(unmap_pixels(jax.nn.sigmoid(out["mean"])) - image).mean((1, 2, 3))
    sums = {
      "loss": Metric(loss.sum(), count),
      "reconstruction_loss": Metric(reconstruction.sum(), count),
      "kl": Metric(kl.sum(), count),
      "mae": Metric(mae.sum(), count),
      "temperature": Metric(temperature * count, count),
      "kl_weight": Metric(kl_weight * count, count),
    }
    return LossOutput(sums)

  def eval_step(self, variables: Variables, frozen: PyTree, batch: Batch) -> EvalOutput:
    del frozen
    image, valid = augment.to_float(batch["token_image"]), batch["valid"].astype(jnp.float32)
    logits = self.module.apply(variables, map_pixels(image), method="logits")
    hard = jax.nn.one_hot(logits.argmax(-1), self.module.vocab_size)  # [B, h, w, V]
    mean, log_scale = self.module.apply(variables, hard, method="decode_soft")
    loss = self._reconstruction(mean, log_scale, map_pixels(image)).mean((1, 2, 3))
    error = unmap_pixels(jax.nn.sigmoid(mean)) - image
    count = valid.sum()
    sums = {
      "loss": Metric((loss * valid).sum(), count),
      "mae": Metric((jnp.abs(error).mean((1, 2, 3)) * valid).sum(), count),
      "mse": Metric(((error**2).mean((1, 2, 3)) * valid).sum(), count),
      "token_counts": Metric((hard.sum((1, 2)) * valid[:, None]).sum(0), count),
    }
    return EvalOutput(sums)

  def figures(self, variables: Variables, frozen: PyTree, batch: Batch) -> dict[str, np.ndarray]:
    """Rows: image, its reconstruction from hard tokens."""
    image = augment.to_float(batch["token_image"])
    ids = self.module.apply(variables, image, method="tokenize")
    grid = tuple(side // self.module.stride for side in self.token_image_size)
    decoded = self.module.apply(variables, ids, grid, method="decode")
    return {
      "reconstructions": drawing.labeled_rows(
        {"image": np.asarray(image), "from its tokens": np.asarray(decoded)}
      )
    }

  def describe(self) -> dict[str, Any]:
    preprocessing = {**_preprocessing(self.config.data), "image_size": self.token_image_size}
    return dict(kind=self.kind, module=base.field_values(self.module), preprocessing=preprocessing)


def _preprocessing(data: ConfigDict) -> dict[str, Any]:
  return dict(
    mean=(-0.125,) * len(data.mean),  # (x + 0.125) / 1.25 is map_pixels
    std=(1.25,) * len(data.mean),
    crop_pct=data.crop_pct,
    interpolation=data.token_interpolation,
    resize="short_side",
    **base.value_range(data),
  )
