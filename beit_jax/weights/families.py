"""ViTs other than BEiT: what of them is translated and what is refused.

All functions work on state dicts in unilm's names, with two more: `register_tokens` [1, R, D], and `norm_pre`, a norm
before the first block.
"""

import functools
import re
from pathlib import Path

import numpy as np

from beit_jax.errors import UserError
from beit_jax.weights.files import lazy

as_float32 = functools.partial(np.asarray, dtype=np.float32)  # also of bfloat16

# Tensors of models that ours cannot represent: a regular expression of names, and what these models have.
FOREIGN_TENSORS = (
  (r"^patch_embed\.(?!proj\.)", "a stem of convolutions in place of one patch embedding"),
  (r"^attn_pool\.", "attention pooling (SigLIP, global_pool='map')"),
  (r"\.attn\.[qk]_norm\.", "norms of queries and keys (qk_norm)"),
  (r"\.mlp\.(w\d+|gate_proj|up_proj|weights_in|fc1_[gx])\.", "a gated feed-forward layer (SwiGLU)"),
  (
    r"\.(attn|mlp)\.(norm|ffn_ln|inner_attn_ln)\.",
    "norms inside attention or the feed-forward layer (BEiT-3, EVA-02)",
  ),
  (r"\.(attns|ffns)\.\d|\.in_proj\.", "parallel branches in its blocks"),
  (r"\.lambda_[qk]\d$", "differential attention"),
  (r"(^|\.)rope\.|^freqs", "rotary positions"),
  (r"rel_pos\.mlp\.", "relative positions from a small network (vit_relpos)"),
  (r"\.rel_pos_[hw]$|^neck\.", "windowed attention with decomposed relative positions (SAM)"),
)


def check_family(state: lazy.State, path: Path) -> None:
  """Refuses models that have what ours lack.

  Raises:
    UserError: names what, and a tensor that shows it.
  """
  for pattern, what in FOREIGN_TENSORS:
    name = next((name for name in state if re.search(pattern, name)), None)
    if name:
      raise UserError(f"{path}: this model has {what}, which this version does not implement (tensor {name})")
  first, second = (state.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
  if first and second and first.shape[:1] != second.shape[1:]:
    raise UserError(
      f"{path}: this model has a gated feed-forward layer (SwiGLU), which this version does not implement (tensor "
      f"blocks.0.mlp.fc1.weight has shape {first.shape})"
    )


def with_zero_biases(state: lazy.State) -> lazy.State:
  """Adds zeros for the biases of q and v if no block has any, and for that of the patch embedding of a CLIP."""
  names: dict[str, int] = {}
  if not any(re.search(r"\.attn\.[qv]_bias$", name) for name in state):
    for name in state:
      if name.endswith("attn.qkv.weight"):
        names |= {name.replace("qkv.weight", f"{x}_bias"): state[name].shape[0] // 3 for x in "qv"}
  if "norm_pre.weight" in state and "patch_embed.proj.bias" not in state:
    names["patch_embed.proj.bias"] = state["patch_embed.proj.weight"].shape[0]
  return {**state, **{name: _zeros(size) for name, size in names.items()}}


def _zeros(size: int) -> lazy.LazyTensor:
  return lazy.LazyTensor((size,), lambda: np.zeros(size, np.float32))


def fold_register_positions(state: lazy.State) -> lazy.State:
  """Adds the positions of register tokens, rows 1 to R of `pos_embed`, to the tokens themselves, which is exact."""
  tokens, positions = state["register_tokens"], state["pos_embed"]
  (_, count, width), rows = tokens.shape, positions.shape[1]

  def read_positions() -> np.ndarray:
    values = positions.read()
    return np.concatenate([values[:, :1], values[:, 1 + count :]], 1)

  def read_tokens() -> np.ndarray:
    return as_float32(tokens.read()) + as_float32(positions.read()[:, 1 : 1 + count])

  return {
    **state,
    "register_tokens": lazy.LazyTensor((1, count, width), read_tokens),
    "pos_embed": lazy.LazyTensor((1, rows - count, width), read_positions),
  }


def join_heads(state: lazy.State, first: str, second: str) -> lazy.State:
  """Makes one head on [cls token, distillation token] of two, whose outputs DeiT averages."""
  parts = [(name, state[f"{first}.{name}"], state[f"{second}.{name}"]) for name in ("weight", "bias")]
  result = {name: value for name, value in state.items() if not name.startswith((f"{first}.", f"{second}."))}
  for name, a, b in parts:
    axis = len(a.shape) - 1

    def read(a: lazy.Readable = a, b: lazy.Readable = b, axis: int = axis) -> np.ndarray:
      left, right = as_float32(a.read()) / 2, as_float32(b.read()) / 2
      return np.concatenate([left, right], 1) if axis else left + right

    result[f"head.{name}"] = lazy.LazyTensor((a.shape[0], 2 * a.shape[1]) if axis else a.shape, read)
  return result


def with_register_positions(positions: np.ndarray, count: int) -> np.ndarray:
  """Adds rows of zeros for register tokens, whose positions are part of the tokens; see `fold_register_positions`."""
  return np.insert(positions, [1] * count, 0, axis=1)


def split_heads(state: lazy.Arrays, first: str, second: str) -> lazy.Arrays:
  """The inverse of `join_heads`: two heads, whose mean is the output."""
  result = {name: value for name, value in state.items() if not name.startswith("head.")}
  for name, half in zip((first, second), np.split(state["head.weight"], 2, 1), strict=True):
    result |= {f"{name}.weight": 2 * half, f"{name}.bias": state["head.bias"]}
  return result


def fold_patch_bias(state: lazy.Arrays) -> lazy.Arrays:
  """Adds the bias of the patch embedding, which CLIP lacks, to the positions of the patches."""
  positions = np.array(state["pos_embed"])
  positions[:, 1:] += state["patch_embed.proj.bias"]
  return {**{name: v for name, v in state.items() if name != "patch_embed.proj.bias"}, "pos_embed": positions}
