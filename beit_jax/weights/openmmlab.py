"""Translates the names of OpenMMLab's second generation (mmpretrain, mmsegmentation 1, mmdetection 3) into unilm's."""

import re
from pathlib import Path
from typing import Any

from beit_jax.errors import UserError
from beit_jax.weights import mmseg
from beit_jax.weights.files import lazy

PATCHES = "patch_embed.projection.weight"
# Names of an encoder -> unilm's and, for LayerScale and the bias of q, k and v of a plain ViT, timm's.
NAMES = (
  (r"^patch_embed\.projection\.", "patch_embed.proj."),
  (r"^layers\.", "blocks."),
  (r"^(blocks\.\d+\.)ln([12])\.", r"\1norm\2."),
  (r"^(blocks\.\d+\.)ffn\.layers\.0\.0\.", r"\1mlp.fc1."),
  (r"^(blocks\.\d+\.)ffn\.layers\.1\.", r"\1mlp.fc2."),
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
  outer = mmseg.BACKBONE if prefix and mmseg.is_segmenter(state) else ""
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
