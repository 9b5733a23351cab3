"""What objectives that recover masked patches share: the config section `mask`, and which patches are recovered."""

import abc
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from beit_jax import augment, losses, masking
from beit_jax.config import ranges
from beit_jax.config.defaults import OptionalOf
from beit_jax.errors import UserError
from beit_jax.models.beit import BeitForMaskedImageModeling, BeitForPixelRecovery, masked_slots
from beit_jax.models.constrain import constrain_batch
from beit_jax.objectives.base import (
  Array,
  Batch,
  EvalOutput,
  LossOutput,
  Metrics,
  PyTree,
  Variables,
  module_fields,
)
from beit_jax.objectives.encoder import EncoderObjective, head_schema
from beit_jax.runtime import sharding

SECTION: dict[str, Any] = dict(
  kind="block",  # "block" (exactly num_masked) | "block_at_most" (v1 as released) | "random" | "none"
  num_masked=75,
  min_block_patches=16,
  max_block_patches=OptionalOf(int),  # None = num_masked
  min_aspect=0.3,  # of a block, width / height; the largest is 1 / min_aspect
)
MAX_CHANCE_OF_EMPTY = 1e-6


class MaskedObjective(EncoderObjective):
  """Base class of objectives in which an encoder sees an image with masked patches and recovers something of patches.

  A subclass gives `loss_metrics`, and calls `prepare_masks` in its `__init__` once `module` exists.
  """

  augmentations = augment.ON_PIXELS
  value_ranges = (
    ("target", ranges.one_of("tokens", "pixels")),
    ("recover", ranges.one_of("masked", "all")),
    (r"mask\.kind", ranges.one_of(*masking.MASKS)),
    (r"mask\.(min|max)_block_patches", ranges.integer(1, 2**20)),
    (r"mask\.min_aspect", ranges.fraction(zero=False)),
    (r"loss\.pixels", ranges.one_of(*losses.PIXEL_LOSSES)),
    (r"tokenizer\.dtype", ranges.one_of(*ranges.DTYPES)),
  )

  @classmethod
  def config_section(cls) -> dict[str, Any]:
    pixels = module_fields(BeitForPixelRecovery, without=("encoder",))
    return dict(
      target="tokens",  # what is predicted of a patch: "tokens" | "pixels", which need no tokenizer
      recover="masked",  # the patches that are predicted: "masked" | "all"
      # vocab_size: None = that of the tokenizer
      model={**head_schema(BeitForMaskedImageModeling), "vocab_size": OptionalOf(int), **pixels},
      mask=SECTION,
      loss=dict(pixels="l2"),  # "l1" | "l2", averaged over the values of a patch
      tokenizer=dict(
        init_from="stage:tokenizer",  # a tokenizer's run, or "stage:NAME"
        dtype=OptionalOf(
          str
        ),  # of the products inside; None = as the tokenizer was trained; see models/dvae.py
        cache="",  # folder written by `python -m beit_jax.tokenize`; "" = tokenize while training
      ),
    )

  @abc.abstractmethod
  def loss_metrics(
    self, variables: Variables, frozen: PyTree, batch: Batch, *, train: bool, rngs: dict[str, Array] | None
  ) -> Metrics:
    """The metrics of a batch, "loss" among them. Pure."""

  @property
  def grid_size(self) -> tuple[int, int]:
    """(h, w) in patches."""
    patch = self.module.encoder["patch_size"]
    return self.image_size[0] // patch, self.image_size[1] // patch

  def prepare_masks(self) -> None:
    """Sets the mask sampler that the config describes.

    Raises:
      UserError: no patch would be recovered, or see `make_sampler`.
    """
    mask = self.config.mask
    if masking.MASKS[mask.kind] is masking.no_mask and self.config.recover != "all":
      raise UserError(
        f"config key 'mask.kind': 'none' masks no patch, so that recover={self.config.recover!r} leaves nothing to "
        "predict; set recover='all'"
      )
    self._sample_masks = make_sampler(mask, self.grid_size)

  def masks(self, batch: Batch) -> Array:
    """The masks of a batch, bool [B, h, w], True = masked."""
    return self._sample_masks(augment.example_keys(self.config.seed, batch["example_key"], "mask"))

  def pixels(self, batch: Batch, *, train: bool) -> dict[str, Array]:
    """The views in a batch, float32 [B, H, W, 3] in [0, 1]. In training all get the same color jitter."""
    views = {name: augment.to_float(batch[name]) for name in self.views() if name in batch}
    return self.augmented(views, batch) if train else views

  def normalized(self, image: Array) -> Array:
    """Normalizes pixels in [0, 1]."""
    return augment.normalize(image, self.config.data.mean, self.config.data.std)

  def slots(self, mask: Array, valid: Array) -> tuple[Array | None, Array]:
    """The patches to recover.

    Args:
      mask: bool [B, h, w].
      valid: bool [B], the examples that count.

    Returns:
      Indices int32 [B, M], or None for all N patches; and weights float32 [B, M] or [B, N].
    """
    if self.config.recover == "all":
      slots, weight = None, jnp.ones((len(mask), math.prod(self.grid_size)))
    else:
      slots, weight = masked_slots(mask, self.config.mask.num_masked)
    return slots, constrain_batch(weight * valid[:, None])

  def recovered(self, mask: Array) -> Array:
    """Which patches are recovered, bool [B, h, w]."""
    return mask | (self.config.recover == "all")

  def loss(self, variables: Variables, frozen: PyTree, batch: Batch, key: Array, step: Array) -> LossOutput:
    del step
    return LossOutput(self.loss_metrics(variables, frozen, batch, train=True, rngs={"drop_path": key}))

  def eval_step(self, variables: Variables, frozen: PyTree, batch: Batch) -> EvalOutput:
    return EvalOutput(self.loss_metrics(variables, frozen, batch, train=False, rngs=None))


def take(values: Array, slots: Array | None) -> Array:
  """The values [B, N, ...] at slots [B, M]; all of them without slots."""
  if slots is None:
    return values
  return jnp.take_along_axis(values, slots.reshape(*slots.shape, *[1] * (values.ndim - 2)), 1)


def check_unused(config: ConfigDict, keys: tuple[str, ...]) -> None:
  """Refuses keys that belong to the other target.

  Raises:
    UserError: one of them is set.
  """
  for key in keys:
    section, _, name = key.partition(".")
    if config[section][name]:
      other = {"tokens": "pixels", "pixels": "tokens"}[config.target]
      raise UserError(
        f"config key {key!r}: {config[section][name]!r} belongs to target={other!r}, and this run has "
        f"target={config.target!r}; leave it out"
      )


def make_sampler(mask: ConfigDict, grid_size: tuple[int, int]) -> Callable[[jax.Array], jax.Array]:
  """The sampler that the config's `mask` section describes.

  Args:
    mask: the section.
    grid_size: (h, w) in patches.

  Returns:
    keys [B] -> masks bool [B, h, w], True = masked.

  Raises:
    UserError: `num_masked` does not fit the grid, or a mask could be empty.
  """
  sampler = masking.MASKS[mask.kind]
  num_patches = grid_size[0] * grid_size[1]
  if sampler is not masking.no_mask and not 0 < mask.num_masked <= num_patches:
    raise UserError(
      f"config key 'mask.num_masked': {mask.num_masked} must lie in [1, {num_patches}] for {grid_size} patches; "
      f"the paper masks about 40 %, here {round(0.383 * num_patches)}"
    )
  accepted = inspect.signature(sampler).parameters.keys() - {"num_masked"}
  options = {name: mask[name] for name in SECTION if name in accepted}
  if sampler is masking.block_mask_at_most:
    _check_rarely_empty(mask, grid_size, options)
  return sharding.by_rows(jax.vmap(lambda key: sampler(key, grid_size, mask.num_masked, **options)))


def _check_rarely_empty(mask: ConfigDict, grid_size: tuple[int, int], options: dict[str, Any]) -> None:
  chance = masking.chance_of_empty(grid_size, mask.num_masked, **options)
  if chance > MAX_CHANCE_OF_EMPTY:
    raise UserError(
      f"config key 'mask.min_block_patches': with {mask.min_block_patches} and num_masked={mask.num_masked} on "
      f"{grid_size} patches a mask is empty with probability {chance:.2g}; lower min_block_patches or use "
      "mask.kind='block'"
    )
