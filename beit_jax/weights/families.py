"""ViTs other than BEiT: what of them is translated, what is refused, and transformers' model types.

All functions work on state dicts in unilm's names, with two more: `register_tokens` [1, R, D], and `norm_pre`, a norm
before the first block.
"""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

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


def traits(fields: dict[str, Any]) -> frozenset[str]:
  """What an encoder with these fields has that not every type of transformers can have."""
  found = {
    "absolute positions": fields["abs_pos"],
    "relative positions": fields["rel_pos"] != "none",
    "LayerScale": fields["layer_scale_init"] != 0,
    "register tokens": fields["register_tokens"] > 0,
    "several register tokens": fields["register_tokens"] > 1,
    "a norm before the blocks": fields["pre_norm"],
  }
  return frozenset(name for name, has in found.items() if has)


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


class ModelType(NamedTuple):
  """A `model_type` of transformers.

  Attributes:
    prefix: the beginning of the encoder's names inside a model with a head.
    classes: the class for each kind of ours.
    pools: how its classifiers pool; the first is that of files whose tensors do not show it.
    has: traits of every encoder of this type; see `traits`.
    may_have: further traits that an encoder of this type can have.
    norm_eps: the default of config.json.
    activation: the default of config.json.
  """

  prefix: str
  classes: dict[str, str]
  pools: tuple[str, ...]
  has: frozenset[str]
  may_have: frozenset[str] = frozenset()
  norm_eps: float = 1e-12
  activation: str = "gelu"


def _classes(stem: str, *kinds: str) -> dict[str, str]:
  ends = dict(backbone="Model", classifier="ForImageClassification", mim="ForMaskedImageModeling")
  return {kind: f"{stem}{ends[kind]}" for kind in ("backbone", "classifier", *kinds)}


_BEIT_TRAITS = frozenset(("absolute positions", "relative positions", "LayerScale"))
_CLIP = ModelType(
  "vision_model.",
  {},
  ("plain_mean",),
  frozenset(("absolute positions", "a norm before the blocks")),
  norm_eps=1e-5,
  activation="quick_gelu",
)
# A model is saved as the type that it came from, or else as the first that has all its traits.
MODEL_TYPES: dict[str, ModelType] = {
  "beit": ModelType("beit.", _classes("Beit", "mim"), ("mean", "cls"), frozenset(), _BEIT_TRAITS),
  "data2vec-vision": ModelType(
    "data2vec_vision.", _classes("Data2VecVision"), ("mean", "cls"), frozenset(), _BEIT_TRAITS
  ),
  "vit": ModelType("vit.", _classes("ViT"), ("cls",), frozenset(("absolute positions",))),
  "deit": ModelType(
    "deit.", _classes("DeiT"), ("cls", "cls_registers"), frozenset(("absolute positions", "register tokens"))
  ),
  "dinov2": ModelType(
    "dinov2.",
    _classes("Dinov2"),
    ("cls_mean",),
    frozenset(("absolute positions", "LayerScale")),
    norm_eps=1e-6,
  ),
  "dinov2_with_registers": ModelType(
    "dinov2_with_registers.",
    _classes("Dinov2WithRegisters"),
    ("cls_mean",),
    frozenset(("absolute positions", "LayerScale", "register tokens")),
    frozenset(("several register tokens",)),
    norm_eps=1e-6,
  ),
  "clip_vision_model": _CLIP._replace(classes={"backbone": "CLIPVisionModel"}),
  "clip": _CLIP._replace(classes={"classifier": "CLIPForImageClassification"}),
}
