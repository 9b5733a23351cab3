"""What the blocks of a BEiT encoder compute: tokens and attention weights.

Shapes: as in layers.py; T = tokens, register tokens last.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from beit_jax.models.beit import Beit
from beit_jax.models.resampling import resize_bilinear

Grid = tuple[int, int]

# Forms of the tokens of a block, [B, 1 + N, D]; the second argument is (h, w).
FEATURE_POOLS: dict[str | None, Callable[[jax.Array, Grid], jax.Array]] = {
  None: lambda tokens, grid_size: tokens,
  "cls": lambda tokens, grid_size: tokens[:, 0],
  "mean": lambda tokens, grid_size: tokens[:, 1:].mean(1),
  "map": lambda tokens, grid_size: tokens[:, 1:].reshape(len(tokens), *grid_size, tokens.shape[-1]),
}


def bare_encoder(fields: dict[str, Any], params: dict[str, Any]) -> Beit:
  """The encoder that has exactly these parameters, with every block compiled by itself.

  Args:
    fields: fields of `Beit`. A classifier and a segmenter override some of them.
    params: parameters of the encoder.
  """
  present = dict(use_mask_token="mask_token" in params, final_norm="norm" in params)
  return Beit(**{**fields, **present, "scan": False, "remat": False})


def block_tokens(
  encoder: Beit,
  params: Any,
  image: jax.Array,
  mask: jax.Array | None,
  blocks: Sequence[int],
  pool: str | None,
) -> list[jax.Array]:
  """The residual stream after some blocks, counted from 0, in a form of `FEATURE_POOLS`; float32."""
  _, tokens = encoder.apply({"params": params}, image, mask)
  form = FEATURE_POOLS[pool]
  return [form(tokens[f"block_{i:02d}"].astype(jnp.float32), encoder.grid_size) for i in blocks]


def block_attention(
  encoder: Beit, params: Any, image: jax.Array, mask: jax.Array | None, block: int
) -> jax.Array:
  """The attention weights of one block, counted from 0: float32 [B, K, T, T]."""
  _, state = encoder.apply({"params": params}, image, mask, mutable=["intermediates"])
  return state["intermediates"][f"block_{block:02d}"]["attn"]["attention"][0]


def point_attention(weights: jax.Array, patch: int, grid_size: Grid, image_size: Grid) -> jax.Array:
  """The attention of one patch to all patches: mean over heads, resized bilinearly to the image.

  Args:
    weights: [B, K, T, T] of a block.
    patch: number of the patch in row-major order.
    grid_size: (h, w).
    image_size: (H, W).

  Returns:
    float32 [B, H, W].
  """
  count = grid_size[0] * grid_size[1]
  maps = weights[:, :, 1 + patch, 1 : 1 + count].mean(1).reshape(-1, *grid_size, 1)
  return resize_bilinear(maps, image_size)[..., 0]
