"""Reads and writes checkpoints of timm: `beit_*` and `beitv2_*` in unilm's names; plain ViTs (`vit_*`, `deit*`)."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.errors import UserError
from beit_jax.weights.files import lazy
from beit_jax.weights.hf import class_names, stated_labels
from beit_jax.weights.pretrained import Pretrained, module_fields
from beit_jax.weights.unilm import export_beit

SIZES = {(768, 12, 12): "base", (1024, 24, 16): "large", (384, 12, 6): "small", (192, 12, 3): "tiny"}


def is_vit(state: lazy.State) -> bool:
  """Whether a state dict is a `VisionTransformer`, which unlike BEiT has one bias for q, k and v."""
  return "blocks.0.attn.qkv.bias" in state


def vit_to_unilm(
  state: lazy.State, path: Path, image_size: tuple[int, int] | None
) -> tuple[lazy.State, list[str]]:
  """Translates the names of timm's VisionTransformer into unilm's.

  The k part of a qkv bias is left out, which is exact: it adds the same number to all logits of a query, and the
  softmax cancels it. A `pos_embed` without a row for the cls token (DeiT III) gets a row of zeros, which is exact too.

  Returns:
    (the tensors, the names of the parts that are left out).
  """
  result: dict[str, lazy.Readable] = {}
  left_out = []
  for name, value in state.items():
    if name.endswith("attn.qkv.bias"):
      if len(value.shape) != 1 or value.shape[0] % 3:
        raise UserError(f"{path}: {name} has shape {value.shape}, expected (3 x width,)")
      stem, width = name.removesuffix("qkv.bias"), value.shape[0] // 3
      result[f"{stem}q_bias"] = lazy.rows(value, 0, width)
      result[f"{stem}v_bias"] = lazy.rows(value, 2 * width, 3 * width)
      left_out.append(f"{stem}qkv.bias[k]")
    elif name == "pos_embed" and _lacks_cls(value, state, image_size):
      result[name] = _with_cls(value)
    else:
      result[re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)] = value
  return result, left_out


def _lacks_cls(pos_embed: lazy.Readable, state: lazy.State, image_size: tuple[int, int] | None) -> bool:
  """Decides by the image size, if it is known; otherwise a square number of rows has none for the cls token."""
  kernel = state.get("patch_embed.proj.weight")
  if len(pos_embed.shape) != 3 or kernel is None or len(kernel.shape) != 4 or 0 in kernel.shape:
    return False
  count = pos_embed.shape[1]
  if image_size is not None:
    return (image_size[0] // kernel.shape[-1]) * (image_size[1] // kernel.shape[-1]) == count
  return math.isqrt(count) ** 2 == count and "dist_token" not in state


def _with_cls(pos_embed: lazy.Readable) -> lazy.LazyTensor:
  _, count, width = pos_embed.shape

  def read() -> np.ndarray:
    patches = pos_embed.read()
    return np.concatenate([np.zeros((1, 1, width), patches.dtype), patches], 1)

  return lazy.LazyTensor((1, count + 1, width), read)


def read_config(folder: Path, state: lazy.State) -> dict[str, Any]:
  """Reads config.json of a model folder.

  Returns:
    Arguments of `lazy.Source`; {} if there is no config.json of timm.

  Raises:
    UserError: the file is damaged, or describes a model that ours cannot represent.
  """
  path = folder / "config.json"
  try:
    config = json.loads(path.read_text()) if path.is_file() else {}
  except ValueError:
    raise UserError(f"{path}: not JSON") from None
  if not isinstance(config, dict) or not isinstance(config.get("pretrained_cfg"), dict):
    return {}
  cfg, args = config["pretrained_cfg"], config.get("model_args") or {}
  pool = config.get("global_pool", args.get("global_pool"))
  if pool == "avg" and "head.weight" in state and "fc_norm.weight" not in state:
    raise UserError(
      f"{path}: global_pool='avg' without fc_norm is a norm before the mean, which this version lacks"
    )
  if args.get("act_layer") not in (None, "gelu"):
    raise UserError(f"{path}: act_layer={args['act_layer']!r}; this version has the exact 'gelu' only")
  fields = {"num_heads": args["num_heads"]} if isinstance(args.get("num_heads"), int) else {}
  names = next(
    (part[key] for part in (config, cfg) for key in ("label_names", "labels") if part.get(key)), None
  )
  facts: dict[str, Any] = dict(fields=fields, labels=stated_labels(names))
  size = cfg.get("input_size")
  if not (isinstance(size, list) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)):
    return facts
  fields["image_size"] = tuple(size[-2:])
  if "mean" not in cfg or "std" not in cfg:
    return facts
  interpolation = cfg.get("interpolation", "bicubic")
  preprocessing = dict(
    mean=cfg["mean"],
    std=cfg["std"],
    image_size=fields["image_size"],
    crop_pct=cfg.get("crop_pct", 0.875),
    interpolation="bicubic" if interpolation == "random" else interpolation,  # random is for training
    resize="squash" if cfg.get("crop_mode") == "squash" else "short_side",
  )
  return {**facts, "preprocessing": preprocessing}


def export(pretrained: Pretrained) -> tuple[lazy.Arrays, str, dict[str, Any], list[str]]:
  """Translates a model into timm's names.

  A model with absolute positions and no bias tables becomes a plain ViT, any other a `beit_*`.

  Returns:
    (state dict, architecture, arguments for `timm.create_model`, names of tensors that are left out).
  """
  fields = pretrained.encoder_fields
  state = export_beit(pretrained, buffers=False)
  left_out = [name for name in ("mask_token",) if state.pop(name, None) is not None]
  if pretrained.spec.is_encoder and not fields["final_norm"]:
    # timm has no model without a norm. That of its classifiers with mean pooling does not touch the tokens; it gets the
    # identity.
    state["fc_norm.weight"] = np.ones(fields["width"], np.float32)
    state["fc_norm.bias"] = np.zeros(fields["width"], np.float32)
  is_plain = fields["abs_pos"] and fields["rel_pos"] == "none"
  if is_plain:
    state = _unilm_to_vit(state)
  architecture, args = _architecture(pretrained, fields, is_plain)
  return state, architecture, args, left_out


def _unilm_to_vit(state: lazy.Arrays) -> lazy.Arrays:
  result = {}
  for name, value in state.items():
    if name.endswith("q_bias"):
      bias = [value, np.zeros_like(value), state[name.replace("q_bias", "v_bias")]]
      result[name.replace("q_bias", "qkv.bias")] = np.concatenate(bias)
    elif not name.endswith("v_bias"):
      result[re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)] = value
  return result


def _architecture(
  pretrained: Pretrained, fields: dict[str, Any], is_plain: bool
) -> tuple[str, dict[str, Any]]:
  """(name of a model of timm, the arguments that make it ours)."""
  size, patch = fields["image_size"], fields["patch_size"]
  family = "vit" if is_plain else "beit"
  variant = SIZES.get((fields["width"], fields["depth"], fields["num_heads"]))
  args: dict[str, Any] = {}
  if variant not in (("tiny", "small", "base", "large") if is_plain else ("base", "large")):
    variant = "base"
    args |= dict(embed_dim=fields["width"], depth=fields["depth"], num_heads=fields["num_heads"])
  if patch != 16:
    args["patch_size"] = patch
  if tuple(size) != (224, 224):
    args["img_size"] = size[0] if size[0] == size[1] else tuple(size)
  if fields["mlp_ratio"] != 4.0:
    args["mlp_ratio"] = fields["mlp_ratio"]
  if is_plain:
    if fields["layer_scale_init"]:
      args["init_values"] = fields["layer_scale_init"]
  else:
    if fields["abs_pos"]:
      args["use_abs_pos_emb"] = True
    if fields["rel_pos"] != "per_block":
      args |= dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=fields["rel_pos"] == "shared")
    if not fields["layer_scale_init"]:
      args["init_values"] = None
  own = module_fields(pretrained.module)
  uses_mean = own["pool"] == "mean" if pretrained.spec.has_pool else not fields["final_norm"]
  pool, default = "avg" if uses_mean else "token", "token" if is_plain else "avg"
  if pool != default:
    args["global_pool"] = pool
  classes = own["num_classes"] if pretrained.spec.has_classes else 0
  if classes != 1000:
    args["num_classes"] = classes
  return f"{family}_{variant}_patch16_224", args


def hub_config(pretrained: Pretrained, architecture: str, args: dict[str, Any]) -> dict[str, Any]:
  """config.json of a model folder that `timm.create_model("local-dir:FOLDER")` reads."""
  p = pretrained.preprocessing
  own = {key: value for key, value in args.items() if key not in ("num_classes", "global_pool")}
  config = {"architecture": architecture, "num_classes": args.get("num_classes", 1000), "model_args": own}
  if pretrained.spec.has_classes and pretrained.description.get("labels"):
    names = class_names(pretrained)["id2label"]
    config["label_names"] = list(names.values())
  if "global_pool" in args:
    config["global_pool"] = args["global_pool"]
  config["pretrained_cfg"] = {
    "input_size": [3, *p["image_size"]],
    "mean": list(p["mean"]),
    "std": list(p["std"]),
    "crop_pct": p["crop_pct"],
    "crop_mode": "squash" if p["resize"] == "squash" else "center",
    "interpolation": p["interpolation"],
    "first_conv": "patch_embed.proj",
    "classifier": "head",
  }
  return config
