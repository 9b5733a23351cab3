"""Hugging Face folders: `BeitModel`, `BeitForMaskedImageModeling`, `BeitForImageClassification`, `FlavaImageCodebook`.

Names of transformers 4, which 5.23 still writes, and those that 5.23 has in memory. transformers is not needed. The
heads of `BeitForSemanticSegmentation` are in segmentation.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.errors import UserError
from beit_jax.runtime.logs import log
from beit_jax.weights.files import lazy
from beit_jax.weights.pretrained import Pretrained
from beit_jax.weights.unilm import TABLE, export_beit

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
      result[f"{stem}qkv.weight"] = lazy.concatenate(parts)
    for x in "qv":
      if f"{stem}{x}.bias" in result:
        result[f"{stem}{x}_bias"] = result.pop(f"{stem}{x}.bias")
    if result.pop(f"{stem}k.bias", None) is not None:
      left_out.append(f"{stem}k.bias")
  return result, left_out


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """config.json and preprocessor_config.json; the second is {} where there is none.

  Raises:
    UserError: a file is damaged, or the first is missing.
  """
  path, prepared = folder / "config.json", folder / "preprocessor_config.json"
  try:
    config = json.loads(path.read_text())
    processor = json.loads(prepared.read_text()) if prepared.is_file() else {}
  except OSError:
    raise UserError(
      f"{folder}: no config.json beside the weights, which says how many heads the model has"
    ) from None
  except ValueError as error:
    raise UserError(f"{folder}: a configuration file is not JSON ({error})") from None
  if not isinstance(config, dict) or not isinstance(processor, dict):
    raise UserError(f"{folder}: config.json and preprocessor_config.json must be tables")
  return config, processor


def read_config(folder: Path) -> dict[str, Any]:
  """config.json and preprocessor_config.json as arguments of `lazy.Source`; these files win over our description.

  Raises:
    UserError: a file is damaged, or says something that our module cannot be.
  """
  path, prepared = folder / "config.json", folder / "preprocessor_config.json"
  config, processor = read_files(folder)
  if config.get("hidden_act", "gelu") != "gelu":
    raise UserError(f"{path}: hidden_act is {config['hidden_act']!r}; BEiT has the exact 'gelu'")

  def value(key, default, good, expected):
    found = config.get(key, default)
    if not good(found):
      raise UserError(f"{path}: {key} is {found!r}, expected {expected}")
    return found

  whole = lambda v: type(v) is int and v > 0  # noqa: E731
  sides = lambda v: whole(v) or (isinstance(v, list) and len(v) == 2 and all(map(whole, v)))  # noqa: E731
  size = value("image_size", 224, sides, "a number of pixels or [height, width]")
  fields = dict(
    norm_eps=value("layer_norm_eps", 1e-12, lambda v: isinstance(v, float) and 0 < v < 1, "a small number"),
    num_heads=value("num_attention_heads", 12, whole, "a positive number"),
    image_size=(size, size) if whole(size) else tuple(size),
  )
  described = json.loads(config.get("beit_jax") or "{}")
  own = described.get("preprocessing")
  # Ours is exact where the file still is the one that we wrote.
  shown = {key: found for key, found in processor.items() if key != "do_reduce_labels"}
  kept = own and shown == json.loads(json.dumps(processor_config(own, processor.get("image_processor_type"))))
  preprocessing = own if kept else _preprocessing(processor, fields["image_size"], prepared)
  return dict(
    fields=fields,
    labels=_labels(config.get("id2label")),
    preprocessing=preprocessing,
    assumed=described.get("assumed", []) if kept else [],
    described=described,
  )


def _labels(id2label: Any) -> list[str]:
  """Names of the classes, [] where there are none but placeholders, or not one for each number."""
  names = {str(k): v for k, v in id2label.items()} if isinstance(id2label, dict) else {}
  labels = [names.get(str(i)) for i in range(len(names))]
  if any(not isinstance(label, str) for label in labels):
    log.warning("id2label does not name the classes 0 to %d one by one; it is not used", len(labels) - 1)
    return []
  return [] if all(re.fullmatch(r"LABEL_\d+", str(label)) for label in labels) else [str(x) for x in labels]


def _preprocessing(p: dict[str, Any], image_size: tuple[int, int], path: Path) -> dict[str, Any] | None:
  """Our preprocessing for theirs; None, with the reason in the log, where there is none or ours cannot be like it."""
  if not p:
    return None
  off = [key for key in ("do_resize", "do_rescale") if p.get(key, True) is not True]
  if off or abs(p.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6 or p.get("resample", 3) not in RESAMPLING:
    log.warning(
      "%s: %s", path, f"{off or 'rescale_factor or resample'} is nothing that beit_jax does; not used"
    )
    return None
  try:
    size = p.get("size", image_size)
    short = isinstance(size, dict) and "shortest_edge" in size
    if isinstance(size, dict):
      height = size["shortest_edge"] if short else size["height"]
    else:
      height = size if isinstance(size, int) else size[0]
    crop = p.get("crop_size", image_size) if p.get("do_center_crop") else None
    crop = crop["height"] if isinstance(crop, dict) else crop[0] if isinstance(crop, tuple | list) else crop
    target = min(image_size) if short else image_size[0]
    if crop is None and height != target or crop is not None and crop != image_size[0]:
      log.warning("%s: it prepares images of another size than the model's %s", path, image_size)
    normalize = p.get("do_normalize", True)
    return dict(
      mean=tuple(p["image_mean"]) if normalize else (0.0, 0.0, 0.0),
      std=tuple(p["image_std"]) if normalize else (1.0, 1.0, 1.0),
      image_size=image_size,
      crop_pct=1.0 if crop is None else target / height,
      interpolation=RESAMPLING[p.get("resample", 3)],
      resize="short_side" if short else "squash",
    )
  except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
    raise UserError(f"{path}: of a form this version does not know ({error!r})") from None


def undo_rectangles(state: lazy.State, image_size: tuple[int, int], patch: int) -> lazy.State:
  """The bias tables that transformers 5.23 really uses with a rectangular grid.

  It reads a table as (width, height) and resizes that bilinearly to (height, width) (modeling_beit.py,
  BeitRelativePositionBias); here the result is computed once, so that our model gives the same numbers.
  """
  height, width = (2 * (side // patch) - 1 for side in image_size)

  def effective(tensor):
    def read():
      table = tensor.read()
      body = table[:-3].astype(np.float64).reshape(width, height, -1)
      body = np.einsum(
        "yi,xj,ijk->yxk", _bilinear(width, height), _bilinear(height, width), body, optimize=True
      )
      return np.concatenate([body.reshape(height * width, -1).astype(table.dtype), table[-3:]])

    return lazy.LazyTensor(tensor.shape, read)

  return {name: effective(value) if name.endswith(TABLE) else value for name, value in state.items()}


def _bilinear(source: int, target: int) -> np.ndarray:
  """[target, source] weights of PyTorch's bilinear resize, align_corners=False."""
  position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
  low = np.floor(position).astype(int)
  weights = np.zeros((target, source))
  np.add.at(weights, (np.arange(target), low), 1 - (position - low))
  np.add.at(weights, (np.arange(target), np.minimum(low + 1, source - 1)), position - low)
  return weights


def export(pretrained: Pretrained) -> tuple[lazy.State, dict[str, Any], dict[str, Any]]:
  """(state dict, config.json, preprocessor_config.json)."""
  kind, fields = pretrained.kind, pretrained.encoder_fields
  state = their_state(export_beit(pretrained, buffers=False), kind)
  mean_pooling = kind == "mim" or (pretrained.module.pool == "mean" if kind == "classifier" else False)
  if kind == "backbone" and not fields["final_norm"]:
    mean_pooling = (
      True  # only then is there no norm over the tokens; their pooler gets a norm that does nothing yet
    )
    state["pooler.layernorm.weight"] = np.ones(fields["width"], np.float32)
    state["pooler.layernorm.bias"] = np.zeros(fields["width"], np.float32)
  names = {
    "backbone": "BeitModel",
    "mim": "BeitForMaskedImageModeling",
    "classifier": "BeitForImageClassification",
  }
  config = encoder_config(fields) | dict(
    architectures=[names[kind]],
    use_mask_token=kind != "classifier" and fields["use_mask_token"],
    use_mean_pooling=mean_pooling,
  )
  if kind == "mim":
    config["vocab_size"] = pretrained.module.vocab_size
  if kind == "classifier":
    config |= class_names(pretrained)
  return state, config, processor_config(pretrained.preprocessing, "BeitImageProcessor")


def their_state(state: lazy.State, kind: str) -> lazy.State:
  """unilm's names and fused tensors -> those of transformers."""
  return {
    _their_name(theirs, kind): part for name, value in state.items() for theirs, part in _split(name, value)
  }


def encoder_config(fields: dict[str, Any]) -> dict[str, Any]:
  """The part of config.json that describes the encoder; warns of rectangles."""
  size = fields["image_size"]
  if size[0] != size[1] and fields["rel_pos"] != "none":
    log.warning(
      "the grid of %s is rectangular: transformers 5.23 reads its bias tables as (width, height), so it computes "
      "something else with these weights than beit_jax does",
      tuple(side // fields["patch_size"] for side in size),
    )
  return dict(
    architectures=[],
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
  )


def class_names(pretrained: Pretrained) -> dict[str, Any]:
  """`id2label` and `label2id` of config.json, one name for every class."""
  count = pretrained.module.num_classes
  labels = list(pretrained.description.get("labels") or ())[:count]
  labels += [f"LABEL_{i}" for i in range(len(labels), count)]
  return dict(
    id2label={str(i): label for i, label in enumerate(labels)},
    label2id={label: i for i, label in enumerate(labels)},
  )


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
