"""Hugging Face folders: `BeitModel`, `BeitForMaskedImageModeling`, `BeitForImageClassification`, `FlavaImageCodebook`.

Names of transformers 4, which 5.23 still writes, and those that 5.23 has in memory. transformers is not needed.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.convert import lazy
from beit_jax.convert.unilm import TABLE, export_beit
from beit_jax.errors import UserError
from beit_jax.logs import log
from beit_jax.pretrained import Pretrained

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# Theirs -> unilm's, in this order; both generations of names.
NAMES = (
  (r"^beit\.", ""),
  (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
  (r"^embeddings\.position_embeddings$", "pos_embed"),
  (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
  (rf"^(encoder\.relative_position_bias|shared_position_bias)\.{TABLE}$", f"rel_pos_bias.{TABLE}"),
  (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
  (r"\.lambda_([12])$", r".gamma_\1"),
  (r"\.layernorm_before\.", ".norm1."),
  (r"\.layernorm_after\.", ".norm2."),
  (rf"\.(attention\.attention\.|attention\.|)relative_position_bias\.{TABLE}$", f".attn.{TABLE}"),
  (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
  (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
  (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
  (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
  (r"\.(intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
  (r"\.(output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
  (r"^pooler\.layernorm\.", "fc_norm."),
  (r"^layernorm\.", "norm."),
  (r"^classifier\.", "head."),
)


def is_beit(state: lazy.State) -> bool:
  return any(name.endswith("embeddings.cls_token") for name in state)


def to_unilm(state: lazy.State, path: Path) -> tuple[lazy.State, list[str]]:
  """Their names -> unilm's with q, k, v fused again; and what is left out.

  Raises:
    UserError: the model norms its tokens twice, which ours does not.
  """
  if "beit.layernorm.weight" in state and "layernorm.weight" in state:
    raise UserError(
      f"{path}: this masked-image model has use_mean_pooling=false: transformers then applies two layer norms in a row "
      "before the head, which no BEiT does; there is no module for it here"
    )
  result: lazy.State = {}
  for name, value in state.items():
    for pattern, replacement in NAMES:
      name = re.sub(pattern, replacement, name)
    result[name] = value
  left_out = []
  for stem in [name.removesuffix("q.weight") for name in result if name.endswith("attn.q.weight")]:
    parts = [result.pop(f"{stem}{x}.weight", None) for x in "qkv"]
    if all(part is not None for part in parts):
      result[f"{stem}qkv.weight"] = lazy.joined(parts)
    for x in "qv":
      if f"{stem}{x}.bias" in result:
        result[f"{stem}{x}_bias"] = result.pop(f"{stem}{x}.bias")
    if result.pop(f"{stem}k.bias", None) is not None:
      left_out.append(f"{stem}k.bias")
  return result, left_out


def read_config(folder: Path) -> dict[str, Any]:
  """config.json and preprocessor_config.json as arguments of `lazy.Source`.

  Raises:
    UserError: they say something that our module cannot be.
  """
  path = folder / "config.json"
  try:
    config = json.loads(path.read_text())
    prepared = folder / "preprocessor_config.json"
    processor = json.loads(prepared.read_text()) if prepared.is_file() else {}
  except OSError:
    raise UserError(
      f"{folder}: no config.json beside the weights, which says how many heads the model has"
    ) from None
  except ValueError as error:
    raise UserError(f"{folder}: a configuration file is not JSON ({error})") from None
  if config.get("hidden_act", "gelu") != "gelu":
    raise UserError(f"{path}: hidden_act is {config['hidden_act']!r}; BEiT has the exact 'gelu'")
  fields = dict(norm_eps=config.get("layer_norm_eps", 1e-12), num_heads=config.get("num_attention_heads", 12))
  size = config.get("image_size", 224)
  fields["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
  labels = {int(k): v for k, v in config.get("id2label", {}).items()}
  described = json.loads(config["beit_jax"]) if isinstance(config.get("beit_jax"), str) else {}
  return dict(
    fields=fields,
    labels=[]
    if all(re.fullmatch(r"LABEL_\d+", v) for v in labels.values())
    else [labels[i] for i in sorted(labels)],
    preprocessing=described.get("preprocessing") or _preprocessing(processor, fields["image_size"]),
    described=described,
  )


def _pair(size: Any) -> tuple[int, int]:
  if isinstance(size, dict):
    size = size.get("shortest_edge") or (size["height"], size["width"])
  return (size, size) if isinstance(size, int) else tuple(size)


def _preprocessing(processor: dict[str, Any], image_size: tuple[int, int]) -> dict[str, Any] | None:
  if "image_mean" not in processor:
    return None
  size = processor.get("size", image_size)
  crop = _pair(processor.get("crop_size", size)) if processor.get("do_center_crop") else _pair(size)
  short = isinstance(size, dict) and "shortest_edge" in size
  return dict(
    mean=tuple(processor["image_mean"]),
    std=tuple(processor["image_std"]),
    image_size=image_size,
    crop_pct=crop[0] / _pair(size)[0],
    interpolation=RESAMPLING.get(processor.get("resample", 3), "bicubic"),
    resize="short_side" if short else "squash",
  )


def export(pretrained: Pretrained) -> tuple[lazy.State, dict[str, Any], dict[str, Any]]:
  """(state dict, config.json, preprocessor_config.json)."""
  kind, fields = pretrained.kind, pretrained.encoder_fields
  state = {}
  for name, value in export_beit(pretrained, buffers=False).items():
    for theirs, part in _split(name, value):
      state[_their_name(theirs, kind)] = part
  mean_pooling = kind == "mim" or (pretrained.module.pool == "mean" if kind == "classifier" else False)
  if kind == "backbone" and not fields["final_norm"]:
    mean_pooling = (
      True  # only then is there no norm over the tokens; their pooler gets a norm that does nothing yet
    )
    state["pooler.layernorm.weight"] = np.ones(fields["width"], np.float32)
    state["pooler.layernorm.bias"] = np.zeros(fields["width"], np.float32)
  size = fields["image_size"]
  if size[0] != size[1] and fields["rel_pos"] != "none":
    log.warning(
      "the grid of %s is rectangular: transformers 5.23 reads its bias tables as (width, height), so it computes "
      "something else with these weights than beit_jax does",
      tuple(side // fields["patch_size"] for side in size),
    )
  names = {
    "backbone": "BeitModel",
    "mim": "BeitForMaskedImageModeling",
    "classifier": "BeitForImageClassification",
  }
  config = dict(
    architectures=[names[kind]],
    model_type="beit",
    hidden_size=fields["width"],
    num_hidden_layers=fields["depth"],
    num_attention_heads=fields["num_heads"],
    intermediate_size=int(fields["width"] * fields["mlp_ratio"]),
    hidden_act="gelu",
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    drop_path_rate=fields["drop_path_rate"],
    layer_norm_eps=fields["norm_eps"],
    image_size=size[0] if size[0] == size[1] else list(size),
    patch_size=fields["patch_size"],
    num_channels=3,
    use_absolute_position_embeddings=fields["abs_pos"],
    use_relative_position_bias=fields["rel_pos"] == "per_block",
    use_shared_relative_position_bias=fields["rel_pos"] == "shared",
    layer_scale_init_value=fields["layer_scale_init"],
    use_mask_token=kind != "classifier" and fields["use_mask_token"],
    use_mean_pooling=mean_pooling,
  )
  if kind == "mim":
    config["vocab_size"] = pretrained.module.vocab_size
  if kind == "classifier":
    count = pretrained.module.num_classes
    labels = list(pretrained.description.get("labels") or ()) or [f"LABEL_{i}" for i in range(count)]
    config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    config["label2id"] = {label: i for i, label in enumerate(labels)}
  return state, config, processor_config(pretrained.preprocessing, "BeitImageProcessor")


def processor_config(p: dict[str, Any], kind: str) -> dict[str, Any]:
  """preprocessor_config.json of our preprocessing."""
  height, width = p["image_size"]
  resized = [round(side / p["crop_pct"]) for side in p["image_size"]]
  squash = p["resize"] == "squash"
  return dict(
    image_processor_type=kind,
    do_resize=True,
    size=dict(height=resized[0], width=resized[1]) if squash else dict(shortest_edge=min(resized)),
    resample={name: number for number, name in RESAMPLING.items()}[p["interpolation"]],
    do_center_crop=not squash or p["crop_pct"] != 1.0,
    crop_size=dict(height=height, width=width),
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=list(p["mean"]),
    image_std=list(p["std"]),
  )


def _split(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
  """unilm's fused tensors -> one per projection, as views."""
  if name.endswith("attn.qkv.weight"):
    third = len(value) // 3
    return [(name.replace("qkv", x), value[i * third : (i + 1) * third]) for i, x in enumerate("qkv")]
  return [(re.sub(r"attn\.([qv])_bias$", r"attn.\1.bias", name), value)]


def _their_name(name: str, kind: str) -> str:
  rules = (
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
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
  for pattern, replacement in rules:
    name = re.sub(pattern, replacement, name)
  outside = ("lm_head.", "classifier.") + (("layernorm.",) if kind == "mim" else ())
  return name if kind == "backbone" or name.startswith(outside) else f"beit.{name}"
