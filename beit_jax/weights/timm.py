"""Reads and writes checkpoints of timm: `beit_*` and `beitv2_*` in unilm's names; plain ViTs (`vit_*`, `deit*`)."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.errors import UserError
from beit_jax.runtime.logs import log
from beit_jax.weights import families
from beit_jax.weights.files import lazy
from beit_jax.weights.hf import class_names, stated_labels
from beit_jax.weights.kinds import module_fields
from beit_jax.weights.pretrained import Pretrained
from beit_jax.weights.unilm import TABLE, export_beit

# timm's names -> ours, with unilm's names for what BEiT has.
IMPORT_NAMES = (
  (r"\.ls([12])\.gamma$", r".gamma_\1"),
  (r"^(reg_token|dist_token)$", "register_tokens"),
)
# Names of files and architectures of models whose tensors alone look like ours.
FOREIGN_NAMES = (
  (r"(?<![a-z])(rope|dinov3|lingbot|sapiens2?|eva02|pe_(core|lang|spatial))(?![a-z])", "rotary positions"),
  (r"(?<![a-z])s?relpos(?![a-z])", "relative positions from a small network"),
  (r"(?<![a-z])rpn(?![a-z])", "norms after the branches of its blocks"),
)
FOREIGN_ARGS = ("block_fn", "attn_layer", "mlp_layer", "norm_layer", "pool_include_prefix", "use_rot_pos_emb")
ACT_LAYERS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "quickgelu": "quick_gelu"}
# Architectures, and the sizes in which timm has them. CLIP's ViTs have another norm_eps, distilled ones two heads.
ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
  "beit": ("beit_{}_patch16_224", ("base", "large")),
  "vit": ("vit_{}_patch16_224", ("tiny", "small", "base", "large")),
  "clip": ("vit_{}_patch16_clip_224", ("base",)),
  "distilled": ("deit_{}_distilled_patch16_224", ("tiny", "small", "base")),
}
SIZES = {(768, 12, 12): "base", (1024, 24, 16): "large", (384, 12, 6): "small", (192, 12, 3): "tiny"}


def is_vit(state: lazy.State) -> bool:
  """Whether a state dict is a `VisionTransformer`, which unlike BEiT has one bias for q, k and v, or none."""
  if "blocks.0.attn.qkv.bias" in state:
    return True
  is_beit = any(re.search(rf"attn\.[qv]_bias$|{TABLE}$", name) for name in state)
  return "blocks.0.attn.qkv.weight" in state and not is_beit


def vit_to_unilm(
  state: lazy.State, path: Path, image_size: tuple[int, int] | None
) -> tuple[lazy.State, list[str]]:
  """Translates the names of timm's VisionTransformer into unilm's.

  The k part of a qkv bias is left out, which is exact: it adds the same number to all logits of a query, and the
  softmax cancels it. A `pos_embed` without rows for the other tokens (DeiT III) gets a row of zeros for the cls token,
  which is exact too. A distillation token becomes a register token, and its head a part of the head. Of a model that
  has register tokens but no cls token (vit_*_reg4_gap), the first register token takes the place of the cls token.

  Returns:
    (the tensors, the names of the parts that are left out).

  Raises:
    UserError: the model has what ours lacks.
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
    else:
      result[lazy.rename(name, IMPORT_NAMES)] = value
  tokens = result.pop("register_tokens", None)
  if tokens is not None and "cls_token" not in result:
    if len(tokens.shape) != 3 or 0 in tokens.shape:
      raise UserError(f"{path}: its register tokens have shape {tokens.shape}, expected (1, count, width)")
    log.info("%s: no class token; the first of %d register tokens takes that place", path, tokens.shape[1])
    result["cls_token"], tokens = _columns(tokens, 0, 1), _columns(tokens, 1, tokens.shape[1])
  if tokens is not None and tokens.shape[1] > 0:
    result["register_tokens"] = tokens
  _check_vit(result, path)
  if "head_dist.weight" in result:
    result = dict(families.join_heads(result, "head", "head_dist"))
  return _with_usual_positions(result, image_size), left_out


def _check_vit(state: lazy.State, path: Path) -> None:
  families.check_family(state, path)
  if "cls_token" not in state:
    raise UserError(f"{path}: this ViT has no class token, which this version does not implement")
  if {"head.weight", "norm.weight", "fc_norm.weight"} <= state.keys():
    raise UserError(
      f"{path}: this model has both norm and fc_norm before its head, which this version does not implement"
    )
  if {"norm.weight", "fc_norm.weight"}.isdisjoint(state) and "blocks.0.norm1.weight" in state:
    raise UserError(
      f"{path}: this ViT has no norm after its blocks (PE, RADIO), which this version does not implement"
    )
  if "blocks.0.attn.q_bias" in state and "blocks.0.gamma_1" in state:
    log.warning(
      "%s is taken for a DeiT III: timm's vit_*_rope_ape have the same tensors, but rotary positions in addition",
      path,
    )


def check_names(name: str, path: Path) -> None:
  """Refuses a model whose file or architecture is named after something that its tensors do not show.

  Raises:
    UserError: says what.
  """
  for pattern, what in FOREIGN_NAMES:
    if re.search(pattern, name):
      raise UserError(f"{path}: {name!r} is a model with {what}, which this version does not implement")


def _columns(tokens: lazy.Readable, start: int, stop: int) -> lazy.LazyTensor:
  shape = (1, stop - start, tokens.shape[2])
  return lazy.LazyTensor(shape, lambda: tokens.read()[:, start:stop])


def _with_usual_positions(state: lazy.State, image_size: tuple[int, int] | None) -> lazy.State:
  """Brings `pos_embed` to one row for the cls token and one for each patch.

  The image size decides how many rows are those of patches, if it is known; otherwise their number is a square.
  """
  positions, kernel = state.get("pos_embed"), state.get("patch_embed.proj.weight")
  if (
    positions is None
    or len(positions.shape) != 3
    or kernel is None
    or len(kernel.shape) != 4
    or 0 in kernel.shape
  ):
    return state
  count, tokens = positions.shape[1], state.get("register_tokens")
  registers = tokens.shape[1] if tokens is not None and len(tokens.shape) == 3 else 0

  def is_grid(patches: int) -> bool:
    if image_size is not None:
      return (image_size[0] // kernel.shape[-1]) * (image_size[1] // kernel.shape[-1]) == patches
    return patches > 0 and math.isqrt(patches) ** 2 == patches

  if is_grid(count):
    state = {**state, "pos_embed": _with_cls(positions)}
  elif registers and is_grid(count - 1 - registers):
    state = families.fold_register_positions(state)
  return state


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
  check_names(str(config.get("architecture", "")), path)
  fields = _stated_fields(config, args, state, path)
  names = next(
    (part[key] for part in (config, cfg) for key in ("label_names", "labels") if part.get(key)), None
  )
  facts: dict[str, Any] = dict(fields=fields, labels=stated_labels(names))
  size, built = (
    cfg.get("input_size"),
    args.get("img_size"),
  )  # the model was built for the latter, if it is stated
  if isinstance(size, list) and built:
    size = [*size[:1], *(built if isinstance(built, list) else [built, built])]
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
  return dict(facts, preprocessing=preprocessing)


def _stated_fields(
  config: dict[str, Any], args: dict[str, Any], state: lazy.State, path: Path
) -> dict[str, Any]:
  """Number of heads, pooling and activation, as far as config.json states them."""
  found = [name for name in FOREIGN_ARGS if args.get(name)]
  if found:
    raise UserError(f"{path}: model_args has {', '.join(found)}, which this version does not implement")
  fields = {"num_heads": args["num_heads"]} if isinstance(args.get("num_heads"), int) else {}
  quick = "quickgelu" in str(
    config.get("architecture")
  )  # the only architectures of ours with another activation
  activation = args.get("act_layer") or ("quick_gelu" if quick else "gelu")
  if activation not in ACT_LAYERS:
    raise UserError(f"{path}: act_layer={activation!r}; this version has {', '.join(ACT_LAYERS)}")
  if ACT_LAYERS[activation] != "gelu" or is_vit(state):
    fields["activation"] = ACT_LAYERS[activation]
  pool = config.get("global_pool", args.get("global_pool"))
  if "head.weight" not in state or pool is None:
    return fields
  pools = {"token": "cls", "avg": "mean" if "fc_norm.weight" in state else "norm_mean"}
  if pool not in pools:
    raise UserError(f"{path}: global_pool={pool!r}; this version has 'token' and 'avg'")
  return dict(fields, pool="cls_registers" if "head_dist.weight" in state else pools[pool])


def with_choices(source: lazy.Source, pool: str | None, activation: str | None) -> lazy.Source:
  """Adds what the file of a ViT may not say, pooling and activation: as given, or else as most have them.

  Args:
    source: the file; `fields` holds what it states.
    pool: a key of `models.beit.POOLS`, where "mean" stands for "norm_mean" too, or None.
    activation: a key of `models.layers.ACTIVATIONS`, or None.

  Raises:
    UserError: the model is a CLIP and its activation is open.
  """
  state, fields = source.state, dict(source.fields)
  is_clip, has_head = "norm_pre.weight" in state, "head.weight" in state and "norm.weight" in state
  if source.described:
    fields.setdefault("activation", "gelu")  # descriptions from before there were others
  if has_head and state["head.weight"].shape[-1] != state["norm.weight"].shape[0]:
    fields.setdefault("pool", "cls_registers")  # two heads, joined
  if is_clip:
    fields.setdefault("norm_eps", 1e-5)
  if has_head and pool:
    fields.setdefault("pool", "norm_mean" if pool == "mean" else pool)
  if activation:
    fields.setdefault("activation", activation)
  guesses = dict(pool="cls", activation="gelu") if has_head else dict(activation="gelu")
  guesses = {name: value for name, value in guesses.items() if name not in fields}
  if is_clip and "activation" in guesses:
    raise UserError(
      f"{source.path}: the file does not state the activation of this CLIP; give activation='quick_gelu' (OpenAI's and "
      "Meta's) or activation='gelu' (most of OpenCLIP's)"
    )
  if guesses:
    shown = ", ".join(f"{name}={value!r}" for name, value in guesses.items())
    log.warning(
      "%s: assumed %s, as in most ViTs, since the file does not say; give %s= otherwise",
      source.path,
      shown,
      "=, ".join(guesses),
    )
  return dataclasses.replace(source, fields={**fields, **guesses}, assumed=[*source.assumed, *guesses])


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
  own = module_fields(pretrained.module)
  _check_pool(own, is_plain)
  if not is_plain and (fields["activation"] != "gelu" or fields["pre_norm"]):
    raise UserError(
      "a model with relative positions and another activation or a norm before its blocks is not in timm"
    )
  usual_eps = 1e-5 if fields["pre_norm"] else 1e-6
  if abs(fields["norm_eps"] - usual_eps) > 1e-6:
    log.warning(
      "norm_eps is %g here and %g in timm's models; outputs differ a little", fields["norm_eps"], usual_eps
    )
  if is_plain:
    state = _unilm_to_vit(state, own.get("pool") == "cls_registers")
  architecture, args = _architecture(pretrained, fields, is_plain)
  return state, architecture, args, left_out


def _unilm_to_vit(state: lazy.Arrays, is_distilled: bool) -> lazy.Arrays:
  result = {}
  if "norm_pre.weight" in state:
    state = families.fold_patch_bias(state)
  for name, value in state.items():
    if name.endswith("q_bias"):
      bias = [value, np.zeros_like(value), state[name.replace("q_bias", "v_bias")]]
      result[name.replace("q_bias", "qkv.bias")] = np.concatenate(bias)
    elif not name.endswith("v_bias"):
      result[re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)] = value
  if "register_tokens" in result:
    tokens = result.pop("register_tokens")
    result["dist_token" if is_distilled else "reg_token"] = tokens
    result["pos_embed"] = families.with_register_positions(result["pos_embed"], tokens.shape[1])
  return families.split_heads(result, "head", "head_dist") if is_distilled else result


def _check_pool(own: dict[str, Any], is_plain: bool) -> None:
  if own.get("pool", "cls") not in ("cls", "mean", *(("norm_mean", "cls_registers") if is_plain else ())):
    raise UserError(
      f"a classifier with pool={own['pool']!r} cannot be saved as timm, which has no such model; use another format"
    )


def _architecture(
  pretrained: Pretrained, fields: dict[str, Any], is_plain: bool
) -> tuple[str, dict[str, Any]]:
  """(name of a model of timm, the arguments that make it ours)."""
  size, patch = fields["image_size"], fields["patch_size"]
  own = module_fields(pretrained.module)
  pool = own["pool"] if pretrained.spec.has_pool else "cls" if fields["final_norm"] else "mean"
  family = (
    "clip"
    if fields["pre_norm"]
    else "distilled"
    if pool == "cls_registers"
    else "vit"
    if is_plain
    else "beit"
  )
  name, sizes = ARCHITECTURES[family]
  variant = SIZES.get((fields["width"], fields["depth"], fields["num_heads"]))
  args: dict[str, Any] = {}
  if variant not in sizes:
    variant = "base"
    args |= dict(embed_dim=fields["width"], depth=fields["depth"], num_heads=fields["num_heads"])
  if patch != 16:
    args["patch_size"] = patch
  if tuple(size) != (224, 224):
    args["img_size"] = size[0] if size[0] == size[1] else tuple(size)
  if fields["mlp_ratio"] != 4.0:
    args["mlp_ratio"] = fields["mlp_ratio"]
  args |= (_vit_args if is_plain else _beit_args)(fields, pool)
  target, default = "avg" if pool.endswith("mean") else "token", "token" if is_plain else "avg"
  if target != default:
    args["global_pool"] = target
  classes = own["num_classes"] if pretrained.spec.has_classes else 0
  if classes != 1000:
    args["num_classes"] = classes
  return name.format(variant), args


def _vit_args(fields: dict[str, Any], pool: str) -> dict[str, Any]:
  args: dict[str, Any] = {}
  if fields["layer_scale_init"]:
    args["init_values"] = fields["layer_scale_init"]
  if fields["activation"] != "gelu":
    args["act_layer"] = fields["activation"]
  if fields["register_tokens"] and pool != "cls_registers":
    args["reg_tokens"] = fields["register_tokens"]
  return args | ({"fc_norm": False} if pool == "norm_mean" else {})


def _beit_args(fields: dict[str, Any], pool: str) -> dict[str, Any]:
  del pool
  args: dict[str, Any] = {}
  if fields["abs_pos"]:
    args["use_abs_pos_emb"] = True
  if fields["rel_pos"] != "per_block":
    args |= dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=fields["rel_pos"] == "shared")
  if not fields["layer_scale_init"]:
    args["init_values"] = None
  return args


def hub_config(pretrained: Pretrained, architecture: str, args: dict[str, Any]) -> dict[str, Any]:
  """config.json of a model folder that `timm.create_model("local-dir:FOLDER")` reads."""
  p = pretrained.preprocessing
  own = {key: value for key, value in args.items() if key not in ("num_classes", "global_pool")}
  config = {"architecture": architecture, "num_classes": args.get("num_classes", 1000), "model_args": own}
  if pretrained.spec.has_classes and pretrained.description.get("labels"):
    names = class_names(pretrained)["id2label"]
    config["label_names"] = list(names.values())
  config["global_pool"] = args.get("global_pool", "avg" if architecture.startswith("beit") else "token")
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
