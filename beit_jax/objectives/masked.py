"""The config section `mask` and the mask sampler that it describes."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from beit_jax import masking
from beit_jax.config import ranges
from beit_jax.config.defaults import OptionalOf
from beit_jax.errors import UserError
from beit_jax.runtime import sharding

SECTION: dict[str, Any] = dict(
  kind="block",  # "block" (exactly num_masked) | "block_at_most" (v1 as released) | "random"
  num_masked=75,
  min_block_patches=16,
  max_block_patches=OptionalOf(int),  # None = num_masked
  min_aspect=0.3,  # of a block, width / height; the largest is 1 / min_aspect
)
RANGES: ranges.Table = (
  (r"mask\.kind", ranges.one_of(*masking.MASKS)),
  (r"mask\.(min|max)_block_patches", ranges.integer(1, 2**20)),
  (r"mask\.min_aspect", ranges.fraction(zero=False)),
)
MAX_CHANCE_OF_EMPTY = 1e-6


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
  num_patches = grid_size[0] * grid_size[1]
  if not 0 < mask.num_masked <= num_patches:
    raise UserError(
      f"config key 'mask.num_masked': {mask.num_masked} must lie in [1, {num_patches}] for {grid_size} patches; "
      f"the paper masks about 40 %, here {round(0.383 * num_patches)}"
    )
  sampler = masking.MASKS[mask.kind]
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
