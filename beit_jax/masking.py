"""Mask samplers, which choose the patches of an image that the encoder does not see. Pure JAX, static shapes.

Every sampler is a function `(key, grid_size, num_masked, ...) -> bool [h, w]`, **True = masked**, and works under `jit`
and `vmap`. Shapes: h, w = grid in patches; A = attempts.

References:
  Algorithm 1 of the BEiT paper (arXiv 2106.08254), as implemented in unilm `beit/masking_generator.py` (at most
  `num_masked`) and `beit2/masking_generator.py` (exactly `num_masked`).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

ATTEMPTS = 10  # draws per block before the sampler gives up (unilm masking_generator.py)
# The slowest of 128 masks of 75 in 14x14 patches takes 8.5 blocks on average and 11 at most (measured).
FIXED_BLOCKS = 8

Carry = tuple[jax.Array, jax.Array, jax.Array]  # key, mask so far, whether the last block failed


def _check_num_masked(grid_size: tuple[int, int], num_masked: int) -> None:
  height, width = grid_size
  if not 0 <= num_masked <= height * width:
    raise ValueError(
      f"num_masked must lie in [0, {height * width}] for a grid of {height}x{width} patches, got {num_masked}"
    )


def _rectangles(
  key: jax.Array, grid_size: tuple[int, int], low: int, high: jax.Array, min_aspect: float
) -> tuple[jax.Array, jax.Array]:
  """`ATTEMPTS` random rectangles, bool [A, h, w], and whether each is smaller than the grid, bool [A]."""
  height, width = grid_size
  area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
  # Python's random.uniform(a, b) accepts a > b and then draws between b and a: if fewer than `low` patches are left,
  # the reference draws areas in (left, low). jax.random.uniform would return `low` every time.
  area = low + (high - low) * jax.random.uniform(area_key, (ATTEMPTS,))
  log_aspect = jax.random.uniform(
    aspect_key, (ATTEMPTS,), minval=math.log(min_aspect), maxval=-math.log(min_aspect)
  )
  block_h = jnp.round(jnp.sqrt(area * jnp.exp(log_aspect))).astype(jnp.int32)
  block_w = jnp.round(jnp.sqrt(area / jnp.exp(log_aspect))).astype(jnp.int32)
  fits = (block_h < height) & (block_w < width)  # strictly smaller, as in the reference

  def start(key: jax.Array, room: jax.Array) -> jax.Array:  # uniform on 0..room, both ends included
    return jax.random.randint(key, (ATTEMPTS,), 0, jnp.maximum(room, 0) + 1)

  top, left = start(top_key, height - block_h), start(left_key, width - block_w)
  row, column = jnp.arange(height), jnp.arange(width)
  rows = (row >= top[:, None]) & (row < (top + block_h)[:, None])  # [A, h]
  columns = (column >= left[:, None]) & (column < (left + block_w)[:, None])  # [A, w]
  return rows[:, :, None] & columns[:, None, :], fits


@functools.partial(
  jax.jit,
  static_argnames=("grid_size", "num_masked", "min_block_patches", "max_block_patches", "min_aspect"),
)
def block_mask_at_most(
  key: jax.Array,
  grid_size: tuple[int, int],
  num_masked: int,
  *,
  min_block_patches: int = 16,
  max_block_patches: int | None = None,
  min_aspect: float = 0.3,
) -> jax.Array:
  """Block-wise mask as BEiT v1 released it: *at most* `num_masked` patches. bool [h, w], True = masked.

  The sampler adds blocks until `num_masked` patches are masked. A block counts if it is smaller than the grid in both
  directions and masks at least one new patch, and no more than are left. After ten failures in a row the sampler stops
  early. The mask can be empty if `num_masked < min_block_patches` (see `chance_of_empty`).

  Args:
    key: random key.
    grid_size: (h, w).
    num_masked: number of masked patches.
    min_block_patches: smallest area of a block. Areas are uniform up to the number of patches left.
    max_block_patches: largest area of a block; None = the number of patches left.
    min_aspect: height / width of a block is log-uniform in [min_aspect, 1 / min_aspect].

  Raises:
    ValueError: `num_masked` is negative or larger than the grid.
  """
  _check_num_masked(grid_size, num_masked)

  def unfinished(carry: Carry) -> jax.Array:
    _, mask, stuck = carry
    return (mask.sum() < num_masked) & ~stuck

  def add_block(carry: Carry) -> Carry:
    key, mask, _ = carry
    key, draw_key = jax.random.split(key)
    left = num_masked - mask.sum()
    limit = left if max_block_patches is None else jnp.minimum(left, max_block_patches)
    rectangles, fits = _rectangles(draw_key, grid_size, min_block_patches, limit, min_aspect)
    new = (rectangles & ~mask).sum((1, 2))  # [A]
    accepted = fits & (new > 0) & (new <= limit)
    # The attempts are independent and the mask changes only on success, so the first success of ten
    # simultaneous draws has the distribution of the reference's sequential loop.
    first = jnp.argmax(accepted)
    any_accepted = accepted.any()
    return key, mask | (rectangles[first] & any_accepted), ~any_accepted

  def add_if_unfinished(_: int, carry: Carry) -> Carry:
    add = unfinished(carry)
    return jax.tree.map(lambda new, old: jnp.where(add, new, old), add_block(carry), carry)

  # In a loop whose length depends on the data, a GPU waits at every block until the host has read the condition. So a
  # loop of fixed length comes first; it leaves few masks of a batch unfinished.
  start = (key, jnp.zeros(grid_size, bool), jnp.array(False))
  carry = jax.lax.fori_loop(0, FIXED_BLOCKS, add_if_unfinished, start)
  return jax.lax.while_loop(unfinished, add_block, carry)[1]


def block_mask(
  key: jax.Array,
  grid_size: tuple[int, int],
  num_masked: int,
  *,
  min_block_patches: int = 16,
  max_block_patches: int | None = None,
  min_aspect: float = 0.3,
) -> jax.Array:
  """Block-wise mask with *exactly* `num_masked` patches, the rule of BEiT v2. bool [h, w], True = masked.

  `block_mask_at_most` comes first; then random patches are masked or unmasked until the number is exact. Arguments and
  errors as there.
  """
  block_key, trim_key = jax.random.split(key)
  mask = block_mask_at_most(
    block_key,
    grid_size,
    num_masked,
    min_block_patches=min_block_patches,
    max_block_patches=max_block_patches,
    min_aspect=min_aspect,
  )
  # Patches of blocks score above all others; random numbers break ties.
  score = mask.ravel() + jax.random.uniform(trim_key, (mask.size,))
  return _top(score, grid_size, num_masked)


def random_mask(key: jax.Array, grid_size: tuple[int, int], num_masked: int) -> jax.Array:
  """Masks `num_masked` patches uniformly at random (the paper's ablation; SimMIM, MAE). bool [h, w], True = masked."""
  _check_num_masked(grid_size, num_masked)
  return _top(jax.random.uniform(key, (grid_size[0] * grid_size[1],)), grid_size, num_masked)


def no_mask(key: jax.Array, grid_size: tuple[int, int], num_masked: int) -> jax.Array:
  """Masks nothing (the paper's ablation "without masking"). bool [h, w], all False."""
  del key, num_masked
  return jnp.zeros(grid_size, bool)


def _top(score: jax.Array, grid_size: tuple[int, int], num_masked: int) -> jax.Array:
  chosen = jax.lax.top_k(score, num_masked)[1]
  return jnp.zeros(score.shape, bool).at[chosen].set(True).reshape(grid_size)


MASKS: dict[str, Callable[..., jax.Array]] = {
  "block": block_mask,
  "block_at_most": block_mask_at_most,
  "random": random_mask,
  "none": no_mask,
}


def chance_of_empty(
  grid_size: tuple[int, int],
  num_masked: int,
  *,
  min_block_patches: int = 16,
  max_block_patches: int | None = None,
  min_aspect: float = 0.3,
) -> float:
  """Probability that `block_mask_at_most` returns no masked patch at all: ten first blocks that do not fit.

  Computed by a midpoint rule over area and aspect, on the host. 0.32 for 8 patches of 14x14 with
  `min_block_patches=16`; below 1e-9 for the released 75 of 196.
  """
  limit = min(num_masked, max_block_patches or num_masked)
  middle = (np.arange(400) + 0.5) / 400
  area = (min_block_patches + (limit - min_block_patches) * middle)[:, None]
  aspect = np.exp(math.log(min_aspect) * (1 - 2 * middle))[None]
  block_h, block_w = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
  fits = (
    (block_h < grid_size[0])
    & (block_w < grid_size[1])
    & (0 < block_h * block_w)
    & (block_h * block_w <= limit)
  )
  return float((1 - fits.mean()) ** ATTEMPTS)
