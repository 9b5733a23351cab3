"""Model types of Hugging Face transformers: their classes, what they can hold, and the names of their tensors."""

import re
from typing import Any, NamedTuple

from beit_jax.weights.unilm import TABLE


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


# transformers' names, both generations -> unilm's.
IMPORT_NAMES = (
  (rf"^({'|'.join(re.escape(row.prefix) for row in MODEL_TYPES.values())})", ""),
  (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
  (r"^embeddings\.class_embedding$", "cls_token"),
  (r"^embeddings\.(register_tokens|distillation_token)$", "register_tokens"),
  (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
  (r"^embeddings\.(patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
  (r"^pre_layrnorm\.", "norm_pre."),
  (r"^post_layernorm\.", "norm."),
  (rf"^(encoder\.relative_position_bias|shared_position_bias)\.{TABLE}$", f"rel_pos_bias.{TABLE}"),
  (r"^(encoder\.layers?|layers)\.(\d+)\.", r"blocks.\2."),
  (r"\.(lambda_|layer_scale)([12])(\.lambda1)?$", r".gamma_\2"),
  (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
  (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
  (rf"\.(attention\.attention\.|attention\.|)relative_position_bias\.{TABLE}$", f".attn.{TABLE}"),
  (r"\.(attention|self_attn)\.(attention\.query|q_proj)\.", ".attn.q."),
  (r"\.(attention|self_attn)\.(attention\.key|k_proj)\.", ".attn.k."),
  (r"\.(attention|self_attn)\.(attention\.value|v_proj)\.", ".attn.v."),
  (r"\.(attention|self_attn)\.(output\.dense|o_proj|out_proj)\.", ".attn.proj."),
  (r"\.(intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
  (r"\.(output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
  (r"^pooler\.layernorm\.", "fc_norm."),
  (r"^layernorm\.", "norm."),
  (r"^classifier\.", "head."),
)
# Of other towers, of decoders, and of a layer behind the features: not part of any model of ours.
LEFT_OUT = "|".join(
  (
    r"^(text_model|text_projection|visual_projection|decoder|(\w+\.)?pooler\.dense)\.",
    r"^logit_scale$",
    r"\.position_ids$",
  )
)
# unilm's names -> those of transformers 4, without the prefix.
EXPORT_NAMES = (
  (r"^(cls_token|mask_token)$", r"embeddings.\1"),
  (r"^register_tokens$", "embeddings.distillation_token"),
  (r"^pos_embed$", "embeddings.position_embeddings"),
  (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
  (r"^rel_pos_bias\.", "encoder.relative_position_bias."),
  (r"^blocks\.", "encoder.layer."),
  (r"\.gamma_([12])$", r".lambda_\1"),
  (r"\.norm1\.", ".layernorm_before."),
  (r"\.norm2\.", ".layernorm_after."),
  (rf"\.attn\.{TABLE}$", rf".attention.attention.relative_position_bias.{TABLE}"),
  (r"\.attn\.q\.", ".attention.attention.query."),
  (r"\.attn\.k\.", ".attention.attention.key."),
  (r"\.attn\.v\.", ".attention.attention.value."),
  (r"\.attn\.proj\.", ".attention.output.dense."),
  (r"\.mlp\.fc1\.", ".intermediate.dense."),
  (r"\.mlp\.fc2\.", ".output.dense."),
  (r"^fc_norm\.", "pooler.layernorm."),
  (r"^norm\.", "layernorm."),
  (r"^head\.", "classifier."),
)
# The names of DINOv2 and of CLIP, made of those above.
DINOV2_NAMES = (
  (r"\.distillation_token$", ".register_tokens"),
  (r"\.lambda_([12])$", r".layer_scale\1.lambda1"),
  (r"\.layernorm_before\.", ".norm1."),
  (r"\.layernorm_after\.", ".norm2."),
  (r"\.intermediate\.dense\.", ".mlp.fc1."),
  (r"(?<!attention)\.output\.dense\.", ".mlp.fc2."),
)
CLIP_NAMES = (
  (r"^embeddings\.cls_token$", "embeddings.class_embedding"),
  (r"^embeddings\.position_embeddings$", "embeddings.position_embedding.weight"),
  (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
  (r"^norm_pre\.", "pre_layrnorm."),
  (r"^layernorm\.", "post_layernorm."),
  (r"^encoder\.layer\.", "encoder.layers."),
  (r"\.attention\.attention\.(q|k|v)\w+\.", r".self_attn.\1_proj."),
  (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
  (r"\.layernorm_before\.", ".layer_norm1."),
  (r"\.layernorm_after\.", ".layer_norm2."),
  *DINOV2_NAMES[-2:],
)
OWN_NAMES = {
  "dinov2": DINOV2_NAMES,
  "dinov2_with_registers": DINOV2_NAMES,
  "clip_vision_model": CLIP_NAMES,
  "clip": CLIP_NAMES,
}
# transformers' `hidden_act` -> ours; it is written under the last of several names.
HIDDEN_ACTS = {
  "gelu": "gelu",
  "quick_gelu": "quick_gelu",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
}
