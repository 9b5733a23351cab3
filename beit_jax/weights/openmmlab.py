"""Reads and writes the names of OpenMMLab's second generation: mmpretrain, mmsegmentation 1, mmdetection 3 (reading).

What is written belongs to their classes `BEiTViT` (or `BEiTPretrainViT`, for masked image models) and `BEiT`.
"""

import re
from pathlib import Path
from typing import Any

from beit_jax.errors import UserError
from beit_jax.weights import mmseg, unilm
from beit_jax.weights.files import lazy
from beit_jax.weights.pretrained import Pretrained

PATCHES = "patch_embed.projection.weight"
# Names of an encoder -> unilm's and, for the bias of q, k and v of a plain ViT, timm's.
NAMES = (
  (r"^patch_embed\.projection\.", "patch_embed.proj."),
  (r"^layers\.", "blocks."),
  (r"^(blocks\.\d+\.)ln([12])\.", r"\1norm\2."),
  (r"^(blocks\.\d+\.)ffn\.layers\.0\.0\.", r"\1mlp.fc1."),
  (r"^(blocks\.\d+\.)ffn\.layers\.1\.", r"\1mlp.fc2."),
  (r"^(blocks\.\d+\.attn\.)attn\.in_proj_(weight|bias)$", r"\1qkv.\2"),
  (r"^(blocks\.\d+\.attn\.)attn\.out_proj\.", r"\1proj."),
  (r"^(blocks\.\d+\.)(attn|ffn)\.gamma([12])\.weight$", r"\1gamma_\3"),
  (r"^ln1\.", "norm."),
  (r"^ln2\.", "fc_norm."),
)
# Heads of a classifier and of a masked image model, and the pyramid of a segmenter, which is a neck there.
HEADS = (
  (r"^head\.(fc|layers\.head)\.", "head."),
  (r"^head\.cls_head\.", "lm_head."),
  (r"^neck\.upsample_4x\.", "backbone.fpn1."),
  (r"^neck\.upsample_2x\.", "backbone.fpn2."),
)
# unilm's and mmseg's names -> OpenMMLab's; the first row that matches counts.
EXPORT_NAMES = (
  (r"^head\.", "head.fc."),
  (r"^lm_head\.", "head.cls_head."),
  (r"^backbone\.fpn1\.", "neck.upsample_4x."),
  (r"^backbone\.fpn2\.", "neck.upsample_2x."),
  (r"^((decode_head|auxiliary_head|backbone)\.)", r"\1"),
  (r"^", "backbone."),
)
ENCODER_NAMES = (
  (r"^(backbone\.)patch_embed\.proj\.", r"\1patch_embed.projection."),
  (r"^(backbone\.)blocks\.", r"\1layers."),
  (r"^(backbone\.layers\.\d+\.)norm([12])\.", r"\1ln\2."),
  (r"^(backbone\.layers\.\d+\.)mlp\.fc1\.", r"\1ffn.layers.0.0."),
  (r"^(backbone\.layers\.\d+\.)mlp\.fc2\.", r"\1ffn.layers.1."),
  (r"^(backbone\.)norm\.", r"\1ln1."),
  (r"^(backbone\.)fc_norm\.", r"\1ln2."),
)
# Fields of an encoder and their values in `BEiTViT`; in mmsegmentation's `BEiT` there is no choice of positions.
FIXED = dict(register_tokens=0, pre_norm=False, activation="gelu", norm_eps=1e-6)
FIXED_IN_SEGMENTERS = dict(FIXED, abs_pos=False, rel_pos="per_block")


def export_file(pretrained: Pretrained) -> tuple[lazy.Arrays, str, dict[str, Any]]:
  """The content of OpenMMLab's file: (state dict, its key, what else the file holds).

  Raises:
    UserError: their classes lack something that the model has.
  """
  is_segmenter = pretrained.spec.tensor_names == "mmseg"
  fields = pretrained.encoder_fields
  for name, value in (FIXED_IN_SEGMENTERS if is_segmenter else FIXED).items():
    if fields.get(name, value) != value:
      raise UserError(
        f"this {pretrained.kind} cannot be saved as openmmlab, which has no BEiT with {name}={fields[name]!r}"
      )
  if is_segmenter and not fields["layer_scale_init"]:
    raise UserError("this segmenter cannot be saved as openmmlab, whose BEiT always has LayerScale")
  if getattr(pretrained.module, "pool", "mean") not in ("mean", "cls"):
    raise UserError(f"this {pretrained.kind} cannot be saved as openmmlab, which has no such way of pooling")
  if is_segmenter:
    state, _, facts = mmseg.export_file(pretrained)
  else:
    labels = list(pretrained.description.get("labels") or ())
    state, facts = (
      unilm.export_beit(pretrained),
      {"meta": {"dataset_meta": {"classes": labels}} if labels else {}},
    )
  return {_export_name(name): value for name, value in state.items()}, "state_dict", facts


def _export_name(name: str) -> str:
  rule = next(rule for rule in EXPORT_NAMES if re.match(rule[0], name))
  return lazy.rename(lazy.rename(name, [rule]), ENCODER_NAMES)


def is_openmmlab(state: lazy.State) -> bool:
  """Whether a state dict has these names."""
  return PATCHES in state or mmseg.BACKBONE + PATCHES in state


def to_unilm(state: lazy.State, path: Path) -> tuple[dict[str, Any], list[str]]:
  """Translates the names of an encoder with or without a head; those of a segmenter become mmseg's.

  Returns:
    (the tensors, the names of those that are left out: necks, heads of other tasks).

  Raises:
    UserError: the model has two layer norms in a row.
  """
  prefix = mmseg.BACKBONE if mmseg.BACKBONE + PATCHES in state else ""
  # Only one of the pyramids is that of unilm.
  has_pyramid = any(re.match(r"neck\.upsample_4x\.|decode_head\.up_convs\.", name) for name in state)
  outer = mmseg.BACKBONE if prefix and has_pyramid and mmseg.is_segmenter(state) else ""
  result, left_out = {}, []
  for name, value in state.items():
    inner = name.removeprefix(prefix)
    head = lazy.rename(name, HEADS) if prefix else name
    if name.startswith(prefix):
      result[outer + lazy.rename(inner, NAMES)] = value
    elif head != name or (outer and re.match(r"(decode|auxiliary)_head\.", name)):
      result[head] = value
    else:
      left_out.append(name)
  if "norm.weight" in result and "fc_norm.weight" in result:
    raise UserError(
      f"{path}: final_norm and out_type='avg_featmap' are two layer norms in a row, which this version does not "
      "implement"
    )
  return result, left_out
