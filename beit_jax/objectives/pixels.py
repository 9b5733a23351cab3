"""Masked image modeling with `target="pixels"`: predict the pixels of masked patches.

This is the ablation "without visual tokens" of the BEiT paper (Table 4). There is no tokenizer: no stage for it, no
second view of the images, no token cache.
"""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from beit_jax import augment, losses
from beit_jax.data import drawing
from beit_jax.data.sources import Source
from beit_jax.models.beit import BeitForPixelRecovery
from beit_jax.objectives import masked
from beit_jax.objectives.base import (
  Array,
  Batch,
  Loader,
  Metric,
  Metrics,
  PyTree,
  Variables,
)
from beit_jax.objectives.encoder import encoder_fields


class PixelRecovery(masked.MaskedObjective):
  """A ViT learns to predict the pixels of masked patches."""

  kind = "mim_pixels"

  def __init__(self, config: ConfigDict, source: Source, load: Loader | None = None) -> None:
    super().__init__(config, source, load)
    tokens_only = ("tokenizer.cache", "model.vocab_size", "model.head_blocks", "model.early_block")
    masked.check_unused(config, tokens_only)
    self.module = self.make_module(config.model, self.image_size, 0)
    self.prepare_masks()

  @classmethod
  def make_module(cls, model: ConfigDict, image_size: tuple[int, int], outputs: int) -> BeitForPixelRecovery:
    del outputs  # the patch size decides
    encoder = encoder_fields(model, image_size, pretrain=True)
    return BeitForPixelRecovery(encoder, model.normalize_patches)

  @classmethod
  def expected_outputs(cls, config: ConfigDict) -> int:
    return config.model.patch_size**2 * config.model.in_channels

  def loss_metrics(
    self, variables: Variables, frozen: PyTree, batch: Batch, *, train: bool, rngs: dict[str, Array] | None
  ) -> Metrics:
    del frozen
    image, mask = self.normalized(self.pixels(batch, train=train)["image"]), self.masks(batch)
    slots, weight = self.slots(mask, batch["valid"])
    predicted = self.module.apply(variables, image, mask, slots=slots, train=train, rngs=rngs)
    targets = masked.take(self.module.targets(image), slots)
    return {"loss": Metric(*losses.pixel_loss(predicted, targets, weight, self.config.loss.pixels))}

  def figures(self, variables: Variables, frozen: PyTree, batch: Batch) -> dict[str, np.ndarray]:
    """Rows: the image, what the encoder sees of it, and the image with the recovered patches in their places."""
    del frozen
    data, mask = self.config.data, self.masks(batch)
    visible = np.asarray(augment.to_float(batch["image"]))
    image = self.normalized(jnp.asarray(visible))
    predicted = self.module.recovered(self.module.apply(variables, image, mask), image)
    predicted = np.asarray(predicted * np.asarray(data.std) + np.asarray(data.mean)).clip(0, 1)
    rows = {
      "image": visible,
      "masked": drawing.gray_out(visible, np.asarray(mask)),
      "recovered pixels": drawing.paste(visible, predicted, np.asarray(self.recovered(mask))),
    }
    return {"masked_image_modelling": drawing.labeled_rows(rows)}
