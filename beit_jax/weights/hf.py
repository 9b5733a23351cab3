"""Reads and writes folders of Hugging Face transformers, without that library.

The model types are those of `hf_types.MODEL_TYPES`. mmseg.py handles the heads of `BeitForSemanticSegmentation`, and
dalle.py handles `FlavaImageCodebook`. Two generations of names are read: those of transformers 4, which 5.24 still
writes, and those that 5.24 uses in memory.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beit_jax.errors import UserError
from beit_jax.runtime.logs import log
from beit_jax.weights import families
from beit_jax.weights.files import lazy
from beit_jax.weights.hf_types import (
  EXPORT_NAMES,
  HIDDEN_ACTS,
  IMPORT_NAMES,
  LEFT_OUT,
  MODEL_TYPES,
  OWN_NAMES,
  traits,
)
from beit_jax.weights.kinds import KINDS, module_fields
from beit_jax.weights.pretrained import Pretrained
from beit_jax.weights.unilm import TABLE, export_beit

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class Folder(NamedTuple):
  """The files of a model: model.safetensors, config.json, preprocessor_config.json and decoder.safetensors."""

  state: lazy.Arrays
  config: dict[str, Any]
  processor: dict[str, Any] | None = None
  decoder: lazy.Arrays | None = None


def is_vit(state: lazy.State) -> bool:
  """Whether a state dict has transformers' names of a BEiT or another ViT."""
  return any(name.endswith(("embeddings.cls_token", "embeddings.class_embedding")) for name in state)


def to_unilm(state: lazy.State, path: Path) -> tuple[lazy.State, list[str]]:
  """Translates transformers' names into unilm's and joins q, k and v.

  Returns:
    (the tensors, the names of those that are left out).

  Raises:
    UserError: the model has two layer norms in a row.
  """
  if "beit.layernorm.weight" in state and "layernorm.weight" in state:
    raise UserError(
      f"{path}: this masked image model has use_mean_pooling=false. transformers then applies two layer norms in a row "
      "before the head, which no other BEiT does and this version does not implement"
    )
  left_out = [name for name in state if re.search(LEFT_OUT, name)]
  result = {lazy.rename(name, IMPORT_NAMES): value for name, value in state.items() if name not in left_out}
  for stem in [name.removesuffix("q.weight") for name in result if name.endswith("attn.q.weight")]:
    parts = [result.pop(f"{stem}{x}.weight") for x in "qkv" if f"{stem}{x}.weight" in result]
    if len(parts) == 3:
      result[f"{stem}qkv.weight"] = lazy.concatenate(parts)
    for x in "qv":
      if f"{stem}{x}.bias" in result:
        result[f"{stem}{x}_bias"] = result.pop(f"{stem}{x}.bias")
    if result.pop(f"{stem}k.bias", None) is not None:
      left_out.append(f"{stem}k.bias")
  for name in ("cls_token", "mask_token", "pos_embed"):  # CLIP has fewer axes, DINOv2's mask token too
    if name in result and len(result[name].shape) < 3:
      result[name] = lazy.reshape(
        result[name], (1, math.prod(result[name].shape[:-1]), result[name].shape[-1])
      )
  if any(name.endswith("embeddings.distillation_token") for name in state) and "pos_embed" in result:
    result = dict(families.fold_register_positions(result))
  if "cls_classifier.weight" in result:
    result = dict(families.join_heads(result, "cls_classifier", "distillation_classifier"))
  return result, left_out


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads config.json and preprocessor_config.json; the second is {} if the file does not exist.

  Raises:
    UserError: a file is damaged, or the first is missing.
  """
  path, processor_path = folder / "config.json", folder / "preprocessor_config.json"
  try:
    config = json.loads(path.read_text())
    processor = json.loads(processor_path.read_text()) if processor_path.is_file() else {}
  except OSError:
    raise UserError(
      f"{folder}: no config.json beside the weights, which states the number of attention heads"
    ) from None
  except ValueError as error:
    raise UserError(f"{folder}: a configuration file is not JSON ({error})") from None
  if not isinstance(config, dict) or not isinstance(processor, dict):
    raise UserError(f"{folder}: config.json and preprocessor_config.json must be JSON objects")
  return config, processor


def _is_positive(value: Any) -> bool:
  return type(value) is int and value > 0


def _is_size(value: Any) -> bool:
  is_pair = isinstance(value, list) and len(value) == 2 and all(map(_is_positive, value))
  return _is_positive(value) or is_pair


def read_config(folder: Path) -> dict[str, Any]:
  """Reads config.json and preprocessor_config.json, which take precedence over our own description.

  Returns:
    Arguments of `lazy.Source`.

  Raises:
    UserError: a file is damaged, or states something that our module cannot represent.
  """
  config, processor = read_files(folder)
  path = folder / "config.json"
  name = config.get("model_type", "beit")
  name = "vit" if name == "vit_mae" else name  # a masked autoencoder, whose decoder is left out
  if name not in MODEL_TYPES:
    raise UserError(f"{path}: model_type is {name!r}; this version reads {', '.join(MODEL_TYPES)}")
  model_type = MODEL_TYPES[name]
  if isinstance(config.get("vision_config"), dict):
    config = {**config, **config["vision_config"]}
  activation = config.get("hidden_act", model_type.activation)
  if activation not in HIDDEN_ACTS:
    raise UserError(f"{path}: hidden_act is {activation!r}; this version has {', '.join(HIDDEN_ACTS)}")

  def value(key: str, default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
    found = config.get(key, default)
    if not is_valid(found):
      raise UserError(f"{path}: {key} is {found!r}, expected {expected}")
    return found

  size = value("image_size", 224, _is_size, "a number of pixels or [height, width]")
  fields = dict(
    norm_eps=value(
      "layer_norm_eps", model_type.norm_eps, lambda v: isinstance(v, float) and 0 < v < 1, "a small number"
    ),
    num_heads=value("num_attention_heads", 12, _is_positive, "a positive number"),
    image_size=(size, size) if _is_positive(size) else tuple(size),
    model_type=name,
  )
  if HIDDEN_ACTS[activation] != "gelu":
    fields["activation"] = HIDDEN_ACTS[activation]
  if model_type.pools[0] != "mean":
    teacher = config.get("architectures") == ["DeiTForImageClassificationWithTeacher"]
    fields["pool"] = "cls_registers" if teacher else model_type.pools[0]
  described = json.loads(config.get("beit_jax") or "{}")
  own = described.get("preprocessing")
  # Our description is exact if the processor's file is still the one that we wrote.
  shown = {key: found for key, found in processor.items() if key != "do_reduce_labels"}
  is_ours = own and shown == json.loads(
    json.dumps(processor_config(own, shown.get("image_processor_type", "")))
  )
  return dict(
    fields=fields,
    labels=stated_labels(config.get("id2label")),
    task=_task(config, path),
    preprocessing=own if is_ours else _preprocessing(processor, fields["image_size"], folder),
    assumed=described.get("assumed", []) if is_ours else [],
    described=described,
  )


def stated_labels(names: Any) -> list[str]:
  """The names of the classes in a list or a dict by number; [] if they are placeholders or do not name every class."""
  if isinstance(names, list):
    names = dict(enumerate(names))
  by_number = {str(k): v for k, v in names.items()} if isinstance(names, dict) else {}
  labels = [by_number.get(str(i)) for i in range(len(by_number))]
  if any(not isinstance(label, str) for label in labels):
    log.warning("the file does not name every class from 0 to %d; its names are not used", len(labels) - 1)
    return []
  return [] if all(re.fullmatch(r"LABEL_\d+", str(label)) for label in labels) else [str(x) for x in labels]


def _task(config: dict[str, Any], path: Path) -> dict[str, bool]:
  """What `problem_type` says of the outputs of a classifier; {} if it does not. One output alone is a value."""
  stated = config.get("problem_type")
  if stated not in (None, *PROBLEM_TYPES):
    raise UserError(f"{path}: problem_type is {stated!r}, expected one of {', '.join(PROBLEM_TYPES)}")
  outputs = config.get("num_labels", len(config.get("id2label") or (0, 1)))
  if stated == "regression" or (outputs == 1 and stated != "multi_label_classification"):
    return {"regression": True}
  return {} if stated is None else {"multi_label": stated == "multi_label_classification"}


def _preprocessing(p: dict[str, Any], image_size: tuple[int, int], folder: Path) -> dict[str, Any] | None:
  """Translates preprocessor_config.json; None, with a warning, if beit_jax cannot prepare images in that way."""
  path = folder / "preprocessor_config.json"
  if not p:
    return None
  off = [key for key in ("do_resize", "do_rescale") if p.get(key, True) is not True]
  if off or abs(p.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6 or p.get("resample", 3) not in RESAMPLING:
    log.warning(
      "%s: not used, since beit_jax does not support its %s", path, off or "rescale_factor or resample"
    )
    return None
  try:
    size = p.get("size", image_size)
    # The processors of CLIP and DINOv2 take one number for the short side, those of ViT and DeiT for both.
    if type(size) is int and re.match(
      "CLIP|Bit", str(p.get("image_processor_type", p.get("feature_extractor_type")))
    ):
      size = {"shortest_edge": size}
    uses_short_side = isinstance(size, dict) and "shortest_edge" in size
    resized = _first_side(size, "shortest_edge" if uses_short_side else "height")
    crop = _first_side(p.get("crop_size", image_size), "height") if p.get("do_center_crop") else None
    target = min(image_size) if uses_short_side else image_size[0]
    if (resized != target) if crop is None else (crop != image_size[0]):
      log.warning("%s: it prepares images of another size than the model's %s", path, image_size)
    normalizes = p.get("do_normalize", True)
    return dict(
      mean=tuple(p["image_mean"]) if normalizes else (0.0, 0.0, 0.0),
      std=tuple(p["image_std"]) if normalizes else (1.0, 1.0, 1.0),
      image_size=image_size,
      crop_pct=1.0 if crop is None else target / resized,
      interpolation=RESAMPLING[p.get("resample", 3)],
      resize="short_side" if uses_short_side else "squash",
    )
  except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
    raise UserError(f"{path}: of a form this version does not know ({error!r})") from None


def _first_side(size: Any, key: str) -> Any:
  """The side `key` of a dict, the first of a pair, or the number itself."""
  if isinstance(size, dict):
    return size[key]
  return size[0] if isinstance(size, tuple | list) else size


def resize_rectangular_tables(state: lazy.State, image_size: tuple[int, int], patch: int) -> lazy.State:
  """Computes the bias tables that transformers 5.23 effectively uses with a rectangular grid.

  It reads a table as (width, height) and resizes it bilinearly to (height, width) (modeling_beit.py,
  BeitRelativePositionBias). Doing the same once makes our outputs equal to transformers'.
  """
  height, width = (2 * (side // patch) - 1 for side in image_size)
  weights = _bilinear(width, height), _bilinear(height, width)

  def resized(tensor: lazy.Readable) -> lazy.LazyTensor:
    def read() -> np.ndarray:
      table = tensor.read()
      body = table[:-3].astype(np.float64).reshape(width, height, -1)
      body = np.einsum("yi,xj,ijk->yxk", *weights, body, optimize=True)
      return np.concatenate([body.reshape(height * width, -1).astype(table.dtype), table[-3:]])

    return lazy.LazyTensor(tensor.shape, read)

  return {name: resized(value) if name.endswith(TABLE) else value for name, value in state.items()}


def _bilinear(source: int, target: int) -> np.ndarray:
  """[target, source] weights of PyTorch's bilinear resize, align_corners=False."""
  position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
  low = np.floor(position).astype(int)
  weights = np.zeros((target, source))
  np.add.at(weights, (np.arange(target), low), 1 - (position - low))
  np.add.at(weights, (np.arange(target), np.minimum(low + 1, source - 1)), position - low)
  return weights


def export(pretrained: Pretrained) -> Folder:
  """Translates a backbone, a masked image model or a classifier.

  Raises:
    UserError: transformers has no such model.
  """
  spec, fields = pretrained.spec, pretrained.encoder_fields
  own = module_fields(pretrained.module)
  name = choose_model_type(pretrained)
  pool = own["pool"] if spec.has_pool else "mean"
  if spec.is_encoder:
    pool = (
      "cls" if fields["final_norm"] else "mean"
    )  # only with mean pooling is there no norm over the tokens
  arrays = export_beit(pretrained, buffers=False)
  if pool == "cls_registers":
    arrays = families.split_heads(arrays, "cls_classifier", "distillation_classifier")
  state = to_hf_names(arrays, pretrained.kind, name)
  hf_class = MODEL_TYPES[name].classes[pretrained.kind] + "WithTeacher" * (pool == "cls_registers")
  config = encoder_config(fields, name) | dict(architectures=[hf_class])
  if "use_mean_pooling" in config:
    config["use_mean_pooling"] = pool == "mean"
  unused = {"beit": "pooler.layernorm"}.get(name) if spec.is_encoder and pool == "mean" else None
  unused = "vision_model.post_layernorm" if name == "clip" else unused
  if unused:  # a norm that the class has but that does not touch the outputs, as the identity
    state[f"{unused}.weight"] = np.ones(fields["width"], np.float32)
    state[f"{unused}.bias"] = np.zeros(fields["width"], np.float32)
  has_mask_token = any(key.endswith("mask_token") for key in state)
  if "use_mask_token" in config:
    config["use_mask_token"] = has_mask_token
  elif has_mask_token and name != "dinov2_with_registers":
    log.info("left out, since %s has no place for it: mask_token", hf_class)
    state = {key: value for key, value in state.items() if not key.endswith("mask_token")}
  if name == "clip":
    config = dict(model_type=name, architectures=[hf_class], vision_config=config, text_config={})
  if spec.has_classes:
    config |= class_names(pretrained)
  elif spec.head_size:
    config[spec.head_size] = own[spec.head_size]
  return Folder(state, config, processor=processor_config(pretrained.preprocessing, "BeitImageProcessor"))


def choose_model_type(pretrained: Pretrained) -> str:
  """The key of `MODEL_TYPES` as which a model is saved.

  Raises:
    UserError: none fits.
  """
  kind, fields = pretrained.kind, pretrained.encoder_fields
  found = traits(fields)
  pool = module_fields(pretrained.module).get("pool")
  for name in (pretrained.description.get("model_type"), *MODEL_TYPES):
    row = MODEL_TYPES.get(str(name))
    if row is None or kind not in row.classes or not row.has <= found <= row.has | row.may_have:
      continue
    needs_norm = pretrained.spec.is_encoder and "mean" not in row.pools
    if (pool is None or pool in row.pools) and (fields["final_norm"] or not needs_norm):
      return str(name)
  shown = ", ".join(sorted(found)) + (f" and pool={pool!r}" if pool else "")
  raise UserError(
    f"a {kind} with {shown} cannot be saved as hf: transformers has no such class. Its other formats are "
    + ", ".join(name for name in pretrained.spec.formats if name != "hf")
  )


def to_hf_names(state: lazy.Arrays, kind: str, model_type: str = "beit") -> lazy.Arrays:
  """Translates unilm's names into those of transformers and splits fused tensors, as views."""
  prefix, names = MODEL_TYPES[model_type].prefix, EXPORT_NAMES + OWN_NAMES.get(model_type, ())
  key_has_bias = prefix not in ("beit.", "data2vec_vision.")
  result = {}

  def add(name: str, value: np.ndarray) -> None:
    name = lazy.rename(name, names)
    result[name if name.startswith(KINDS[kind].hf_outside) else prefix + name] = value

  for name, value in _with_unusual_tensors(state, model_type).items():
    if name.endswith("attn.qkv.weight"):
      stem = name.removesuffix("qkv.weight")
      for part, third in zip("qkv", np.split(value, 3), strict=True):
        add(f"{stem}{part}.weight", third)
      if key_has_bias:
        add(f"{stem}k.bias", np.zeros(len(third), np.float32))
    else:
      add(re.sub(r"attn\.([qv])_bias$", r"attn.\1.bias", name), value)
  return result


def _with_unusual_tensors(state: lazy.Arrays, model_type: str) -> lazy.Arrays:
  """Brings the few tensors that some types have in another shape, or not at all, into theirs."""
  if model_type == "deit":
    return {**state, "pos_embed": families.with_register_positions(state["pos_embed"], 1)}
  if model_type.startswith("dinov2") and "mask_token" in state:
    return {**state, "mask_token": state["mask_token"][0]}
  if model_type == "dinov2_with_registers":
    return {**state, "mask_token": np.zeros((1, state["cls_token"].shape[-1]), np.float32)}
  if model_type.startswith("clip"):
    result = {name: value for name, value in families.fold_patch_bias(state).items() if name != "mask_token"}
    return {**result, "pos_embed": result["pos_embed"][0], "cls_token": state["cls_token"][0, 0]}
  return state


def encoder_config(fields: dict[str, Any], model_type: str = "beit") -> dict[str, Any]:
  """The part of config.json that describes the encoder; warns if the grid is rectangular."""
  size = fields["image_size"]
  if size[0] != size[1] and fields["rel_pos"] != "none":
    log.warning(
      "the grid of %s is rectangular: transformers 5.23 reads its bias tables as (width, height), so that it computes "
      "other outputs with these weights than beit_jax",
      tuple(side // fields["patch_size"] for side in size),
    )
  config = dict(
    architectures=[],
    model_type="clip_vision_model" if model_type == "clip" else model_type,
    hidden_size=fields["width"],
    num_hidden_layers=fields["depth"],
    num_attention_heads=fields["num_heads"],
    intermediate_size=int(fields["width"] * fields["mlp_ratio"]),
    hidden_act={ours: theirs for theirs, ours in HIDDEN_ACTS.items()}[fields["activation"]],
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    drop_path_rate=fields["drop_path_rate"],
    layer_norm_eps=fields["norm_eps"],
    image_size=size[0] if size[0] == size[1] else list(size),
    patch_size=fields["patch_size"],
    num_channels=3,
  )
  if model_type.startswith("dinov2"):
    if fields["mlp_ratio"] != int(fields["mlp_ratio"]):
      raise UserError(f"mlp_ratio={fields['mlp_ratio']}: transformers' {model_type} has whole numbers only")
    own = dict(
      mlp_ratio=int(fields["mlp_ratio"]), layerscale_value=fields["layer_scale_init"], use_swiglu_ffn=False
    )
    own |= (
      dict(use_mask_token=True)
      if model_type == "dinov2"
      else dict(num_register_tokens=fields["register_tokens"])
    )
    return config | own
  if "beit" not in model_type and "data2vec" not in model_type:
    return config
  return config | dict(
    use_mask_token=False,
    use_mean_pooling=True,
    use_absolute_position_embeddings=fields["abs_pos"],
    use_relative_position_bias=fields["rel_pos"] == "per_block",
    use_shared_relative_position_bias=fields["rel_pos"] == "shared",
    layer_scale_init_value=fields["layer_scale_init"],
  )


def class_names(pretrained: Pretrained) -> dict[str, Any]:
  """`id2label` and `label2id` of config.json, one name for every class, and `problem_type` unless it is the usual."""
  facts = pretrained.description
  tasks = {"regression": "regression", "multi_label": "multi_label_classification"}
  stated = [{"problem_type": name} for key, name in tasks.items() if facts.get(key)]
  count = module_fields(pretrained.module)["num_classes"]
  labels = list(pretrained.description.get("labels") or ())[:count]
  labels += [f"LABEL_{i}" for i in range(len(labels), count)]
  return dict(
    id2label={str(i): label for i, label in enumerate(labels)},
    label2id={label: i for i, label in enumerate(labels)},
    **(stated[0] if stated else {}),
  )


def processor_config(p: dict[str, Any], processor_type: str) -> dict[str, Any]:
  """Translates our preprocessing into preprocessor_config.json."""
  height, width = p["image_size"]
  resized = [round(side / p["crop_pct"]) for side in p["image_size"]]
  squash = p["resize"] == "squash"
  return dict(
    image_processor_type=processor_type,
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
