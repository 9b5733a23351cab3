"""Reads and writes BEiT checkpoints of microsoft/unilm.

Every other format is translated into unilm's names first. They are those of `beit/modeling_pretrain.py` and
`beit/modeling_finetune.py`, which are ours with other punctuation. `import_beit` builds a model from any state dict in
these names and infers the module's fields from the shapes.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.models.beit import LAYER_SCALE_INIT, VARIANTS
from beit_jax.models.layers import relative_position_index
from beit_jax.runtime.logs import log
from beit_jax.weights import families
from beit_jax.weights.files import lazy
from beit_jax.weights.kinds import KINDS, make_module, variable_shapes
from beit_jax.weights.pretrained import Pretrained, fingerprint

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
MAX_SIDE = (
  64  # patches, so 1024 pixels for patches of 16; bounds what a file of a few kilobytes can make us allocate
)
TABLE = "relative_position_bias_table"
# Index buffers are recomputed. A bias on k cancels in the softmax. Segmenters and detectors of unilm have a pyramid
# beside the encoder. MoCo, DINO and iBOT have a projector in place of the head, and iBOT a mask token of its own.
# Averages have a counter.
LEFT_OUT = (
  r"relative_position_index$|attn\.k_bias$|^fpn\d\."
  r"|^head\.(\d+|mlp|last_layer)\.|^masked_embed$|^(n_averaged|steps)$"
)
# Patch aggregation of BEiT v2 (beit2/modeling_pretrain.py), of which only a masked image model has use.
AGGREGATION = r"^cls_pt_(layers|lm_head)\."
# Our names -> unilm's; the others differ in punctuation only.
OTHER_NAMES = (
  (r"^(head_)?block_0*(\d+)/", lambda m: f"{'cls_pt_layers' if m[1] else 'blocks'}.{m[2]}/"),
  (r"^head_lm_head/", "cls_pt_lm_head/"),
  (r"patch_embed/", "patch_embed/proj/"),
  (r"/(kernel|scale)$", "/weight"),
)
# Fields that neither shapes nor outputs show, so that they are taken from a description of ours.
DESCRIBED_FIELDS = (
  "drop_path_rate",
  "layer_scale_init",
  "weight_init",
  "dtype",
  "residual_dtype",
  "remat",
  "scan",
  "head_init_scale",
)


def torch_name(name: str) -> str:
  """Our parameter's name -> unilm's."""
  name = name.removeprefix("encoder/")
  for pattern, theirs in OTHER_NAMES:
    name = re.sub(pattern, theirs, name)
  return name.replace("/", ".")


def check_shape(state: lazy.State, name: str, ndim: int, path: Path) -> lazy.Shape:
  """The shape of a tensor that must be there, with a number of axes.

  Raises:
    UserError: it is not.
  """
  if name not in state or len(state[name].shape) != ndim or 0 in state[name].shape:
    found = state[name].shape if name in state else "nothing"
    raise UserError(
      f"{path}: not a BEiT or ViT that this version knows: expected {name!r} with {ndim} axes, found {found} "
      f"among {len(state)} tensors ({', '.join(list(state)[:4])}, ...)"
    )
  return state[name].shape


def _grid_size(
  source: lazy.Source, patch: int, tables: list[str], image_size: tuple[int, int] | None
) -> tuple[int, int]:
  """(h, w) from the position parameters; the image size decides between grids with the same number of rows."""
  state, path = source.state, source.path
  if tables:
    name = tables[0]
    rows = check_shape(state, name, 2, path)[0] - 3
    side = (math.isqrt(max(rows, 0)) + 1) // 2
  elif "pos_embed" in state:
    name = "pos_embed"
    rows = check_shape(state, name, 3, path)[1] - 1
    side = math.isqrt(max(rows, 0))
  else:
    raise UserError(
      f"{path}: neither a relative-position table nor pos_embed, so its positions are unknown (rotary ones, say)"
    )

  def fits(h: int, w: int) -> bool:
    return rows == ((2 * h - 1) * (2 * w - 1) if tables else h * w)

  shape = state[name].shape
  if rows > (2 * MAX_SIDE - 1) ** 2:
    raise UserError(f"{path}: {name} with shape {shape} is for more than {MAX_SIDE} x {MAX_SIDE} patches")
  size = image_size or source.fields.get("image_size")
  if size is None:
    if not fits(side, side):
      raise UserError(
        f"{path}: {name} with shape {shape} belongs to no square grid; give image_size=(height, width)"
      )
    return side, side
  height, width = size
  grid = (height // patch, width // patch)
  if not fits(*grid) or height % patch or width % patch:
    known = f"; it fits {(side * patch,) * 2}" if fits(side, side) else ""
    raise UserError(
      f"{path}: image_size={tuple(size)} gives a grid of {grid} patches, which does not fit {name} with shape "
      f"{shape}{known}. To use the weights at another size, load them at their own size and fine-tune "
      "(init_from), which resizes the positions"
    )
  return grid


def _num_heads(source: lazy.Source, width: int, depth: int, tables: list[str], given: int | None) -> int:
  stated = source.state[tables[0]].shape[1] if tables else source.fields.get("num_heads")
  if stated and given and stated != given:
    raise UserError(f"{source.path}: num_heads={given} was given, but the file says {stated}")
  found = stated or given
  if not found:
    sizes = [(v["width"], v["depth"], v["num_heads"]) for v in VARIANTS.values()]
    found = next((heads for w, d, heads in sizes if (w, d) == (width, depth)), None)
    if found is None:
      raise UserError(
        f"{source.path}: the file does not state the number of attention heads (width {width}); give num_heads="
      )
    log.warning(
      "%s: num_heads=%d is assumed, as in every published ViT of width %d except the small one of MoCo v3; give "
      "num_heads= if yours differs",
      source.path,
      found,
      width,
    )
  if width % found:
    raise UserError(f"{source.path}: num_heads={found} does not divide the width {width}")
  return found


def infer(
  source: lazy.Source, num_heads: int | None, image_size: tuple[int, int] | None
) -> tuple[str, dict[str, Any]]:
  """Infers (kind of model, module fields) from names and shapes.

  Raises:
    UserError: the state dict is not a BEiT or ViT, or leaves something open; the message names the argument.
  """
  state, path = source.state, source.path
  families.check_family(state, path)
  width = check_shape(state, "cls_token", 3, path)[-1]
  out, channels, patch, patch_w = check_shape(state, "patch_embed.proj.weight", 4, path)
  if channels != 3 or patch != patch_w or out != width:
    raise UserError(
      f"{path}: patch_embed.proj.weight has shape {(out, channels, patch, patch_w)}, expected ({width}, 3, P, P)"
    )
  numbers = {m[1] for m in (re.match(r"blocks\.(\d+)\.", name) for name in state) if m}
  depth = len(numbers)
  if numbers != {str(i) for i in range(depth)}:
    raise UserError(
      f"{path}: its blocks are not numbered from 0 without a gap: {', '.join(sorted(numbers)[:8])}"
    )
  hidden = check_shape(state, "blocks.0.mlp.fc1.weight", 2, path)[0]
  shared, own = f"rel_pos_bias.{TABLE}", f"blocks.0.attn.{TABLE}"
  tables = [name for name in (shared, own) if name in state]
  grid = _grid_size(source, patch, tables, image_size)
  heads = _num_heads(source, width, depth, tables, num_heads)
  kind = next((k for k, row in KINDS.items() if row.head and f"{row.head}.weight" in state), "backbone")
  spec, ratio = KINDS[kind], hidden / width
  layer_scale_init = LAYER_SCALE_INIT.get("large" if depth >= 24 else "base", 0.1)
  fields: dict[str, Any] = dict(
    image_size=tuple(side * patch for side in grid),
    patch_size=patch,
    width=width,
    depth=depth,
    num_heads=heads,
    mlp_ratio=ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
    rel_pos="shared" if shared in state else "per_block" if own in state else "none",
    abs_pos="pos_embed" in state,
    layer_scale_init=layer_scale_init if "blocks.0.gamma_1" in state else 0.0,
    norm_eps=source.fields.get("norm_eps", 1e-6),
    weight_init="finetune" if spec.has_classes else "pretrain",
  )
  if "activation" in source.fields:
    fields["activation"] = source.fields["activation"]
  if "norm_pre.weight" in state:
    fields["pre_norm"] = True
  if "register_tokens" in state:
    fields["register_tokens"] = check_shape(state, "register_tokens", 3, path)[1]
  if spec.head is None or spec.head_size is None:
    return kind, dict(fields, use_mask_token="mask_token" in state, final_norm="norm.weight" in state)
  fields = {"encoder": fields, spec.head_size: check_shape(state, f"{spec.head}.weight", 2, path)[0]}
  if spec.has_aggregation:
    fields |= _aggregation_fields(source, depth)
  if spec.has_pool:
    fields["pool"] = source.fields.get("pool", "mean" if "fc_norm.weight" in state else "cls")
  return kind, fields


def _aggregation_fields(source: lazy.Source, depth: int) -> dict[str, Any]:
  """The fields of patch aggregation; {} without it. No tensor shows which block is the early one."""
  found = {m[1] for m in (re.match(r"cls_pt_layers\.(\d+)\.", name) for name in source.state) if m}
  if not found:
    return {}
  early = source.fields.get("early_block")
  if early is None:
    early = max(depth - 3, 1)
    log.warning(
      "%s: early_block=%d is assumed, as in BEiT v2 base (9 of 12) and large (21 of 24); only pre-training uses it",
      source.path,
      early,
    )
    source.assumed = [*source.assumed, "early_block"]
  shared = "cls_pt_lm_head.weight" not in source.state
  return dict(early_block=early, head_blocks=len(found), shared_lm_head=shared)


def param_shapes(module: nn.Module, image_size: tuple[int, int]) -> dict[str, lazy.Shape]:
  """The shapes of a module's parameters by our flat names."""
  params = variable_shapes(module, image_size)["params"]
  return {name: tuple(leaf.shape) for name, leaf in trees.flatten(params).items()}


def read_params(
  source: lazy.Source,
  state: lazy.State,
  shapes: Mapping[str, lazy.Shape],
  to_foreign_name: Callable[[str], str],
  left_out: list[str],
) -> dict[str, Any]:
  """Reads nested parameters from a state dict.

  Args:
    source: the file, for messages.
    state: the tensors to read, all of which must belong to the model.
    shapes: the wanted shapes by our flat names.
    to_foreign_name: gives the name in `state` for a name of ours.
    left_out: names of ignored tensors, for the log.

  Raises:
    UserError: lists every missing, unexpected and mis-shaped tensor at once.
  """
  names = {name: to_foreign_name(name) for name in shapes}
  problems = []
  for name, theirs in names.items():
    wanted = lazy.torch_shape(shapes[name], name)
    if theirs not in state:
      problems.append(f"missing     {theirs} {wanted}")
    elif tuple(state[theirs].shape) != wanted:
      problems.append(f"mis-shaped  {theirs} {tuple(state[theirs].shape)}, expected {wanted}")
  extra = sorted(state.keys() - set(names.values()))
  problems += [f"unexpected  {name} {tuple(state[name].shape)}" for name in extra]
  if problems:
    raise UserError(
      f"{source.path}: {len(problems)} tensors do not fit the model that the others describe:\n  "
      + "\n  ".join(problems)
    )
  lazy.report(str(source.path), [(names[name], name, shape) for name, shape in shapes.items()], left_out)
  return trees.unflatten({ours: lazy.to_params(state[name].read(), ours) for ours, name in names.items()})


def drop(source: lazy.Source, pattern: str) -> tuple[dict[str, lazy.Readable], list[str]]:
  """(the tensors whose names a regex does not match, the names of those left out, earlier ones included)."""
  state = {name: value for name, value in source.state.items() if not re.search(pattern, name)}
  return state, source.left_out + [name for name in source.state if name not in state]


def import_beit(source: lazy.Source, num_heads: int | None, image_size: tuple[int, int] | None) -> Pretrained:
  """Builds the model of a state dict in unilm's names.

  Raises:
    UserError: lists every tensor that is missing, unexpected or mis-shaped, or asks for what cannot be inferred.
  """
  kind, fields = infer(source, num_heads, image_size)
  source = dataclasses.replace(source, state=families.with_zero_biases(source.state))
  spec, pattern = KINDS[kind], LEFT_OUT
  if not spec.takes_mask:
    pattern += r"|^mask_token$"
  if spec.has_pool:
    pattern += r"|^norm\." if fields["pool"] in ("mean", "plain_mean") else r"|^fc_norm\."
  if spec.is_encoder:
    pattern += r"|^fc_norm\."
  if not fields.get("head_blocks"):
    pattern += f"|{AGGREGATION}"
  state, left_out = drop(source, pattern)
  fields = add_described_fields(source, kind, fields)
  size = (fields if spec.is_encoder else fields["encoder"])["image_size"]
  shapes = param_shapes(make_module(kind, fields), size)
  params = read_params(source, state, shapes, torch_name, left_out)
  return finish(
    source,
    kind=kind,
    fields=fields,
    variables={"params": params},
    preprocessing=_assumed_preprocessing(source, size),
    left_out=left_out,
  )


def finish(
  source: lazy.Source,
  *,
  kind: str,
  fields: dict[str, Any],
  variables: dict[str, Any],
  preprocessing: dict[str, Any],
  left_out: list[str],
) -> Pretrained:
  """Makes the `Pretrained` of a foreign file, with its description.

  Args:
    source: the file.
    kind: a key of `KINDS`.
    fields: the module's fields.
    variables: the parameters under "params", and other Linen collections.
    preprocessing: the one to assume if the file does not state its own; its `image_size` holds in any case.
    left_out: names of ignored tensors.
  """
  if left_out:
    shortened = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in left_out)
    log.info("%s: left out %s", source.path, ", ".join(shortened))
  stated, assumed = source.preprocessing, source.assumed
  if stated is None:
    stated, assumed = preprocessing, ["preprocessing", *(a for a in assumed if a != "preprocessing")]
    log.warning("%s does not state the preprocessing of its images; assumed: %s", source.path, preprocessing)
  stated = {**stated, "image_size": preprocessing["image_size"]}
  params = variables["params"]
  collections = {name: tree for name, tree in variables.items() if name != "params"}
  labels = source.labels if KINDS[kind].has_classes else []
  if len(labels) > fields.get("num_classes", 0):
    log.warning(
      "%s names %d classes, but the model has %d; the names are not used",
      source.path,
      len(labels),
      fields.get("num_classes", 0),
    )
    labels = []
  description = {
    **source.described,
    **(source.task if KINDS[kind].has_pool else {}),
    "kind": kind,
    "module": fields,
    "preprocessing": lazy.check_preprocessing(stated, source.path),
    "labels": labels,
    "format": source.format,
    "path": str(source.path),
    "assumed": assumed,
    "left_out": left_out,
    "sha256": fingerprint(params, collections),
  }
  if source.fields.get("model_type", "beit") != "beit":  # to save it as the same class of transformers
    description["model_type"] = source.fields["model_type"]
  return Pretrained(kind, params, make_module(kind, fields), stated, description, collections)


def add_described_fields(source: lazy.Source, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
  """Adds what shapes cannot show (stochastic depth, initial LayerScale, ...) from a description of ours."""
  module = source.described.get("module")
  if not module or source.described.get("kind") != kind:
    return fields

  def add(found: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    result = found | {name: described[name] for name in DESCRIBED_FIELDS if name in described}
    if "encoder" in found:
      result["encoder"] = add(found["encoder"], described.get("encoder", {}))
    return result

  return add(fields, module)


def _assumed_preprocessing(source: lazy.Source, image_size: tuple[int, int]) -> dict[str, Any]:
  """unilm's preprocessing, with ImageNet's statistics if the file's name is of a family that uses them."""
  name = f"{source.path.name} {source.fields.get('model_type', '')}".lower()
  uses_imagenet = any(word in name for word in ("beitv2", "beit2", "deit", "dino", "mae", "ibot", "moco"))
  statistics = CLIP if "norm_pre.weight" in source.state else IMAGENET if uses_imagenet else HALF
  return usual_preprocessing(statistics, image_size)


def usual_preprocessing(statistics: dict[str, Any], image_size: tuple[int, int]) -> dict[str, Any]:
  """The preprocessing with which unilm evaluates classifiers, for the given mean and std."""
  crop_pct = 0.875 if 32 < max(image_size) < 384 else 1.0  # up to 32 pixels unilm neither resizes nor crops
  return {
    **statistics,
    **dict(image_size=image_size, crop_pct=crop_pct, interpolation="bicubic", resize="short_side"),
  }


def export_beit(pretrained: Pretrained, *, buffers: bool = True, aggregation: bool = False) -> lazy.Arrays:
  """The state dict of a model in unilm's names and PyTorch's layout, for all formats that have these models.

  Args:
    pretrained: the model.
    buffers: add the index buffers that unilm saves.
    aggregation: keep the blocks of patch aggregation, which other formats do not have and the outputs do not need.
  """
  flat = trees.flatten(pretrained.params)
  if not aggregation and any(name.startswith("head_block_") for name in flat):
    log.info("the blocks of patch aggregation are left out; only the formats orbax and unilm hold them")
    flat = {name: value for name, value in flat.items() if not name.startswith("head_")}
  state = {torch_name(name): lazy.to_torch(value, name) for name, value in flat.items()}
  if buffers:
    state |= index_buffers(pretrained, state)
  return dict(sorted(state.items(), key=lambda item: order(item[0])))


def export_file(pretrained: Pretrained) -> tuple[lazy.Arrays, str, dict[str, Any]]:
  """The content of unilm's file: (state dict, its key, what else the file holds)."""
  return export_beit(pretrained, aggregation=True), "model", {}


def index_buffers(pretrained: Pretrained, state: lazy.Arrays) -> lazy.Arrays:
  """`relative_position_index` int64 for every bias table of an exported state dict."""
  fields = pretrained.encoder_fields
  grid = tuple(side // fields["patch_size"] for side in fields["image_size"])
  index = relative_position_index(grid).astype(np.int64)
  return {n.replace(TABLE, "relative_position_index"): index for n in state if n.endswith(TABLE)}


def order(name: str) -> tuple[int, int]:
  """A sort key that gives roughly PyTorch's order: embedding, positions, blocks, heads."""
  stem = [
    "cls_token",
    "mask_token",
    "register_tokens",
    "pos_embed",
    "patch_embed",
    "norm_pre",
    "rel_pos_bias",
  ]
  stem += ["blocks", "norm", "fc_norm"]
  parts = name.split(".")
  number = int(parts[1]) if parts[0] in ("blocks", "cls_pt_layers") else 0
  return (stem.index(parts[0]) if parts[0] in stem else len(stem), number)
