"""microsoft/unilm's BEiT checkpoints, and the names into which every other format is translated first.

The names are those of `beit/modeling_pretrain.py` and `beit/modeling_finetune.py`: our own with other punctuation.
`import_beit` builds a model from any state dict in them: fields are inferred from shapes.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.models.beit import LAYER_SCALE_INIT, VARIANTS
from beit_jax.models.layers import relative_position_index
from beit_jax.runtime.logs import log
from beit_jax.weights.files import lazy
from beit_jax.weights.pretrained import Pretrained, fingerprint, make_module

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
MAX_SIDE = 64  # patches; at 16 pixels 1024: what a file of a few kilobytes can make us allocate has a limit
TABLE = "relative_position_bias_table"
# Index buffers are recomputed, a bias on k cancels in the softmax, the patch-aggregation head of v2 is thrown away
# after pre-training (beit2/modeling_pretrain.py).
LEFT_OUT = r"relative_position_index$|attn\.k_bias$|^cls_pt_layers\.|^cls_pt_lm_head\."


def torch_name(name: str) -> str:
  """Our parameter's name -> unilm's."""
  name = re.sub(r"^block_0*(\d+)/", r"blocks.\1/", name.removeprefix("encoder/"))
  name = name.replace("patch_embed/", "patch_embed/proj/")
  return re.sub(r"/(kernel|scale)$", "/weight", name).replace("/", ".")


def _need(state: lazy.State, name: str, ndim: int, path: Any) -> tuple[int, ...]:
  if name not in state or len(state[name].shape) != ndim or 0 in state[name].shape:
    found = state[name].shape if name in state else "nothing"
    raise UserError(
      f"{path}: no BEiT or ViT as far as this version knows: expected {name!r} with {ndim} axes, found {found} "
      f"among {len(state)} tensors ({', '.join(list(state)[:4])}, ...)"
    )
  return state[name].shape


def _grid(source: lazy.Source, patch: int, tables: list[str], image_size: tuple[int, int] | None):
  """(h, w) from the position parameters; `image_size` decides where the number of rows leaves it open."""
  state, path = source.state, source.path
  if tables:
    name = tables[0]
    rows = _need(state, name, 2, path)[0] - 3
    fits = lambda h, w: (2 * h - 1) * (2 * w - 1) == rows  # noqa: E731
    side = (math.isqrt(max(rows, 0)) + 1) // 2
  elif "pos_embed" in state:
    name = "pos_embed"
    rows = _need(state, name, 3, path)[1] - 1
    fits = lambda h, w: h * w == rows  # noqa: E731
    side = math.isqrt(max(rows, 0))
  else:
    raise UserError(
      f"{path}: neither a relative-position table nor pos_embed: its positions are of an unknown kind"
    )
  if rows > (2 * MAX_SIDE - 1) ** 2:
    raise UserError(
      f"{path}: {name} with shape {state[name].shape} is for more than {MAX_SIDE} x {MAX_SIDE} patches"
    )
  size = image_size or source.fields.get("image_size")
  if size is None:
    if not fits(side, side):
      raise UserError(
        f"{path}: {name} with shape {state[name].shape} belongs to no square grid; give image_size=(height, width)"
      )
    return side, side
  grid = tuple(s // patch for s in size)
  if not fits(*grid) or any(s % patch for s in size):
    known = f"; it fits {(side * patch,) * 2}" if fits(side, side) else ""
    raise UserError(
      f"{path}: image_size={tuple(size)} gives a grid of {grid} patches, which does not fit {name} with shape "
      f"{state[name].shape}{known}. To use the weights at another size, load them as they are and fine-tune "
      "(init_from): positions are resized there"
    )
  return grid


def _heads(source: lazy.Source, width: int, depth: int, tables: list[str], num_heads: int | None) -> int:
  table = source.state[tables[0]].shape[1] if tables else None
  known = table or source.fields.get("num_heads")
  if known and num_heads and known != num_heads:
    raise UserError(f"{source.path}: num_heads={num_heads} was given, but the file says {known}")
  if known or num_heads:
    found = known or num_heads
  else:
    sizes = [(v["width"], v["depth"], v["num_heads"]) for v in VARIANTS.values()]
    found = next((heads for w, d, heads in sizes if (w, d) == (width, depth)), None)
    if found is None:
      raise UserError(
        f"{source.path}: nothing in it tells the number of attention heads (width {width}); give num_heads="
      )
    log.warning(
      "%s: num_heads=%d is assumed, as in every published ViT of width %d but MoCo v3's small one; give num_heads= "
      "if yours differs",
      *(source.path, found, width),
    )
  if width % found:
    raise UserError(f"{source.path}: num_heads={found} does not divide the width {width}")
  return found


def infer(source: lazy.Source, num_heads: int | None, image_size: tuple[int, int] | None) -> tuple[str, dict]:
  """(kind, module fields) from names and shapes.

  Raises:
    UserError: what is missing, and by which argument it can be given.
  """
  state, path = source.state, source.path
  width = _need(state, "cls_token", 3, path)[-1]
  out, channels, patch, patch_w = _need(state, "patch_embed.proj.weight", 4, path)
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
  hidden = _need(state, "blocks.0.mlp.fc1.weight", 2, path)[0]
  shared, own = f"rel_pos_bias.{TABLE}", f"blocks.0.attn.{TABLE}"
  tables = [name for name in (shared, own) if name in state]
  grid = _grid(source, patch, tables, image_size)
  heads = _heads(source, width, depth, tables, num_heads)
  gammas = "blocks.0.gamma_1" in state
  kind = "mim" if "lm_head.weight" in state else "classifier" if "head.weight" in state else "backbone"
  ratio = hidden / width
  fields: dict[str, Any] = dict(
    image_size=tuple(side * patch for side in grid),
    patch_size=patch,
    width=width,
    depth=depth,
    num_heads=heads,
    mlp_ratio=ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
    rel_pos="shared" if shared in state else "per_block" if own in state else "none",
    abs_pos="pos_embed" in state,
    layer_scale_init=LAYER_SCALE_INIT.get("large" if depth >= 24 else "base", 0.1) if gammas else 0.0,
    norm_eps=source.fields.get("norm_eps", 1e-6),
    weight_init="finetune" if kind == "classifier" else "pretrain",
  )
  if kind == "mim":
    return kind, dict(encoder=fields, vocab_size=_need(state, "lm_head.weight", 2, path)[0])
  if kind == "classifier":
    pool = "mean" if "fc_norm.weight" in state else "cls"
    return kind, dict(encoder=fields, num_classes=_need(state, "head.weight", 2, path)[0], pool=pool)
  return kind, dict(fields, use_mask_token="mask_token" in state, final_norm="norm.weight" in state)


def param_shapes(module: Any, image_size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
  """Our flat parameter names and their shapes."""
  image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
  return {name: tuple(leaf.shape) for name, leaf in trees.flatten(shapes).items()}


def read_params(
  state: lazy.State, shapes: dict[str, tuple[int, ...]], naming: Any, path: Any, left_out: list[str]
):
  """Nested parameters out of a state dict; `naming` gives the name there for ours.

  Raises:
    UserError: lists every missing, unexpected and mis-shaped tensor at once.
  """
  names = {name: naming(name) for name in shapes}
  problems = []
  for name, shape in shapes.items():
    wanted, there = lazy.torch_shape(shape, name), names[name]
    if there not in state:
      problems.append(f"missing     {there} {wanted}")
    elif tuple(state[there].shape) != wanted:
      problems.append(f"mis-shaped  {there} {tuple(state[there].shape)}, expected {wanted}")
  extra = sorted(state.keys() - set(names.values()))
  problems += [f"unexpected  {name} {tuple(state[name].shape)}" for name in extra]
  if problems:
    raise UserError(
      f"{path}: {len(problems)} tensors do not fit the model that the others make:\n  "
      + "\n  ".join(problems)
    )
  lazy.report(str(path), [(there, name, shapes[name]) for name, there in names.items()], left_out)
  return trees.unflatten({name: lazy.to_params(state[there].read(), name) for name, there in names.items()})


def import_beit(source: lazy.Source, num_heads: int | None, image_size: tuple[int, int] | None) -> Pretrained:
  """The model of a state dict in unilm's names.

  Raises:
    UserError: lists every tensor that is missing, unexpected or mis-shaped, or asks for what cannot be inferred.
  """
  kind, fields = infer(source, num_heads, image_size)
  pattern = LEFT_OUT
  if kind == "classifier":
    unused = "norm" if fields["pool"] == "mean" else "fc_norm"
    pattern += rf"|^mask_token$|^{unused}\."
  elif kind == "backbone":
    pattern += r"|^fc_norm\."
  left_out = source.left_out + [name for name in source.state if re.search(pattern, name)]
  state = {name: value for name, value in source.state.items() if not re.search(pattern, name)}
  fields = described_fields(source, kind, fields)
  module = make_module(kind, fields)
  size = fields["image_size"] if kind == "backbone" else fields["encoder"]["image_size"]
  params = read_params(state, param_shapes(module, size), torch_name, source.path, left_out)
  return finish(source, kind, fields, params, _assumed_preprocessing(source, size), left_out)


def finish(
  source: lazy.Source,
  kind: str,
  fields: dict[str, Any],
  params: dict[str, Any],
  usual: dict[str, Any],
  left_out: list[str],
  collections: dict[str, Any] | None = None,
) -> Pretrained:
  """The model of a foreign file with its description; `usual` is the preprocessing where the file does not say."""
  if left_out:
    log.info("%s: left out %s", source.path, ", ".join(_short(left_out)))
  preprocessing, assumed = source.preprocessing, source.assumed
  if preprocessing is None:
    preprocessing, assumed = usual, ["preprocessing", *(a for a in assumed if a != "preprocessing")]
    log.warning("%s does not say how its images are prepared; assumed: %s", source.path, preprocessing)
  preprocessing = lazy.check_preprocessing({**preprocessing, "image_size": usual["image_size"]}, source.path)
  description = {
    **source.described,
    **dict(
      kind=kind,
      module=fields,
      preprocessing=preprocessing,
      labels=source.labels if kind in ("classifier", "segmenter") else [],
    ),
    **dict(format=source.format, path=str(source.path), assumed=assumed, left_out=left_out),
  }
  description["sha256"] = fingerprint(params, collections)
  return Pretrained(kind, params, make_module(kind, fields), preprocessing, description, collections or {})


def described_fields(source: lazy.Source, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
  """Adds what shapes cannot tell (stochastic depth, initial LayerScale, ...) from a description of ours."""
  module = source.described.get("module")
  if not module or source.described.get("kind") != kind:
    return fields
  free = (
    "drop_path_rate",
    "layer_scale_init",
    "weight_init",
    "dtype",
    "remat",
    "scan",
    "head_init_scale",
  )

  def keep(found, told):
    result = {**found, **{k: told[k] for k in free if k in told}}
    if "encoder" in found:
      result["encoder"] = keep(found["encoder"], told.get("encoder", {}))
    return result

  return keep(fields, module)


def _assumed_preprocessing(source: lazy.Source, image_size: tuple[int, int]) -> dict[str, Any]:
  """unilm's evaluation; ImageNet's statistics where the file's name tells of a family that uses them."""
  name = source.path.name.lower()
  family = any(word in name for word in ("beitv2", "beit2", "deit", "dino", "mae"))
  return dict(
    **(IMAGENET if family else HALF),
    image_size=image_size,
    crop_pct=0.875 if max(image_size) < 384 else 1.0,
    interpolation="bicubic",
    resize="short_side",
  )


def _short(names: list[str]) -> list[str]:
  """`blocks.3.x` twelve times -> `blocks.*.x` once."""
  return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def export_beit(pretrained: Pretrained, *, buffers: bool = True) -> lazy.State:
  """State dict in unilm's names and PyTorch's layout; with `buffers` the index buffers that unilm saves."""
  flat = trees.flatten(pretrained.params)
  state = {torch_name(name): lazy.to_torch(value, name) for name, value in flat.items()}
  if buffers:
    state |= index_buffers(pretrained, state)
  return dict(sorted(state.items(), key=lambda item: order(item[0])))


def index_buffers(pretrained: Pretrained, state: lazy.State) -> dict[str, np.ndarray]:
  """`relative_position_index` int64 for every bias table of an exported state dict."""
  fields = pretrained.encoder_fields
  grid = tuple(side // fields["patch_size"] for side in fields["image_size"])
  index = relative_position_index(grid).astype(np.int64)
  return {n.replace(TABLE, "relative_position_index"): index for n in state if n.endswith(TABLE)}


def order(name: str) -> tuple:
  """PyTorch's order, roughly: embedding, positions, blocks, heads."""
  stem = ("cls_token", "mask_token", "pos_embed", "patch_embed", "rel_pos_bias", "blocks", "norm", "fc_norm")
  parts = name.split(".")
  number = int(parts[1]) if parts[0] == "blocks" else 0
  return (stem.index(parts[0]) if parts[0] in stem else len(stem), number)
