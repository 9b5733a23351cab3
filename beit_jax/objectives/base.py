"""What an objective is: the only layer that knows model, mask and loss together.

Sums: every metric is a pair (sum, count), so that it can be added over microbatches, eval steps and processes and
divided last. The first of a training step is "loss"; its sum is what is differentiated.
"""

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError
from ml_collections import ConfigDict

from beit_jax import config as config_lib
from beit_jax import convert, ranges, transfer, trees
from beit_jax.data import pipeline
from beit_jax.data.images import Views
from beit_jax.errors import UserError
from beit_jax.logs import log
from beit_jax.models import attention, beit
from beit_jax.pretrained import Pretrained

MAX_PATCHES = 64 * 64  # with relative positions: their index has the square of that many entries
MAX_PARAMETERS = 2**35  # 128 GiB of float32: more is a slip of the pen
Sums = dict[str, tuple[jax.Array, jax.Array]]
Variables = dict[str, Any]


class Objective:
  """Base class; a subclass sets `kind`, builds `self.module` and fills in `views`, `loss`, `eval_step`.

  Args of the constructor:
    config: the run's complete config.
    source: the training data (for the number of classes).
    load: instead of `convert.load`, path of a frozen part -> `Pretrained`, whose parameters may be shapes.
  """

  kind: str
  eval_metrics: tuple[str, ...] = ("loss",)  # the names that an evaluation gives
  augmentations: tuple[str, ...] = ()  # of those on the device: "color_jitter", "random_erasing"
  trains = True  # otherwise there is nothing to optimise: the run is an evaluation

  def __init__(self, config: ConfigDict, source: Any, load: Callable[[str], Pretrained] | None = None):
    self.config, self.source = config, source
    self.load_frozen = load or convert.load
    data = config.data
    self.image_size = config_lib.pair(data.image_size, "data.image_size")
    self.token_image_size = config_lib.pair(data.token_image_size, "data.token_image_size")

  @classmethod
  def model_fields(cls) -> dict[str, Any]:
    """The keys of the config's `model` section with their defaults."""
    raise NotImplementedError

  @property
  def depth(self) -> int:
    """Blocks of the encoder, for layer-wise lr decay; 0 where there is none."""
    return 0

  def views(self) -> Views:
    """The pictures this objective wants of each example: name -> ((H, W), interpolation)."""
    raise NotImplementedError

  def reader(self) -> Any:
    """How examples become arrays: see `pipeline.Views`."""
    return pipeline.Views(self.views(), self.config.data.to_dict())

  def init(self, key: jax.Array) -> Variables:
    """Fresh Linen variables. Pure."""
    raise NotImplementedError

  def frozen_params(self, mesh: jax.sharding.Mesh) -> Any:
    """Host side: arrays that take part but are not trained; {} for none."""
    del mesh
    return {}

  def loss(self, variables: Variables, frozen: Any, batch: Any, key: jax.Array, step: jax.Array) -> tuple:
    """Train mode, pure: (sum of the loss, (Sums, new collections)). `step` drives temperatures and weights."""
    raise NotImplementedError

  def eval_step(self, variables: Variables, frozen: Any, batch: Any) -> Sums:
    """Eval mode, pure; honours batch["valid"] (bool [B]).

    Under the name "rows" there may be a dict of arrays [B, ...], with `valid`: what cannot be added up. The valid
    rows of the whole set come back in `summarize_rows` and `report`, in the order of the data.
    """
    raise NotImplementedError

  # An objective whose images differ in size evaluates them itself: (variables, source, mesh) -> (metrics, rows).
  evaluate_images: Callable[[Variables, Any, Any], tuple[dict, dict]] | None = None

  def summarize(self, sums: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Host side: the sums of a whole eval set -> metrics."""
    return {name: float(total / max(count, 1)) for name, (total, count) in sums.items()}

  def summarize_rows(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Host side: metrics that need every example at once."""
    del rows
    return {}

  def report(self, rows: dict[str, np.ndarray], metrics: dict[str, float], folder: Path) -> list[Path]:
    """Host side, `eval_only`: writes files about the evaluation to a folder and returns their paths."""
    del rows, metrics, folder
    return []

  def check_eval(self, step: int, metrics: dict[str, float]) -> None:
    """Host side, after each evaluation: may warn, or raise a UserError to stop the run."""

  def figures(self, variables: Variables, frozen: Any, batch: Any) -> dict[str, np.ndarray]:
    """Host side: name -> uint8 picture [H, W, 3] of what the model does on one batch."""
    return {}

  def adapt(self, pretrained: Pretrained, shapes: Any) -> dict[str, Any]:
    """Flat names and values out of a checkpoint that replace fresh parameters. Default: exactly the same tree."""
    if pretrained.kind != self.kind:
      raise UserError(f"init_from: the checkpoint is a {pretrained.kind}, this run trains a {self.kind}")
    found, wanted = trees.flatten(pretrained.params), trees.flatten(shapes)
    names = sorted(found.keys() | wanted.keys())
    shape = lambda tree, n: tuple(tree[n].shape) if n in tree else "nothing"  # noqa: E731
    lines = [
      f"{n}: found {shape(found, n)}, expected {shape(wanted, n)}"
      for n in names
      if shape(found, n) != shape(wanted, n)
    ]
    if lines:
      raise UserError("init_from: the checkpoint does not fit the model:\n  " + "\n  ".join(lines))
    return found

  def describe(self) -> dict[str, Any]:
    """What a checkpoint says of the model: kind, module fields, preprocessing."""
    raise NotImplementedError

  def image_preprocessing(self) -> dict[str, Any]:
    data = self.config.data
    return dict(
      mean=tuple(data.mean),
      std=tuple(data.std),
      image_size=self.image_size,
      crop_pct=data.crop_pct,
      interpolation=data.interpolation,
      resize=data.resize,
    )

  def load_params(self, path: str, shapes: Any) -> tuple[dict[str, Any], str]:
    """For evaluation: every parameter, flat, out of a checkpoint, and the checkpoint's path.

    Raises:
      UserError: not all of them are there.
    """
    pretrained = convert.load(path, ema=self.config.eval.ema)
    found = self.adapt(pretrained, shapes)
    missing = [name for name in trees.flatten(shapes) if name not in found]
    if missing:
      raise UserError(
        f"eval_only: {path} has no fitting {', '.join(missing)}; the data has {self.source.num_classes} classes, so "
        "set model.num_classes to the checkpoint's, or fine-tune first"
      )
    return found, str(pretrained.description.get("path"))

  def load_collections(self, path: str) -> Variables:
    """For evaluation: the Linen collections besides the parameters, out of the checkpoint that `load_params` named."""
    del path
    return {}


@contextlib.contextmanager
def building() -> Iterator[None]:
  """Around the initialisation of a module whose fields are the config's: what it raises becomes a UserError."""
  try:
    yield
  except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, FlaxError) as error:
    reason = f"{type(error).__name__}: {ranges.show(str(error))[1:-1]}"
    raise UserError(f"config section 'model': no model can be built as it says ({reason})") from error


def check_size(shapes: Any) -> None:
  """Refuses a tree of parameters that nobody has the memory for."""
  count = trees.num_params(shapes)
  if count > MAX_PARAMETERS:
    raise UserError(f"config section 'model': {count:,} parameters are more than {MAX_PARAMETERS:,}")


def module_fields(module: type, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
  """Linen dataclass fields with their defaults: the schema of a config section."""
  skip = {"parent", "name", *without}
  return {f.name: f.default for f in dataclasses.fields(module) if f.name not in skip}


def encoder_schema() -> dict[str, Any]:
  """`model` keys of everything with a BEiT encoder: a variant, a preset, and each field to override them with."""
  fields = module_fields(
    beit.Beit, without=("image_size", "use_mask_token", "final_norm", "weight_init", "init")
  )
  decided = dict(width=int, depth=int, num_heads=int, rel_pos=str, abs_pos=bool, layer_scale_init=float)
  return {
    "variant": "base",
    "preset": "plus",
    **fields,
    **{name: config_lib.Maybe(kind) for name, kind in decided.items()},
  }


def encoder_fields(model: ConfigDict, image_size: tuple[int, int], *, pretrain: bool) -> dict[str, Any]:
  """The config's `model` section -> the fields of `Beit`, checked."""
  if model.variant not in beit.VARIANTS:
    near = difflib.get_close_matches(model.variant, list(beit.VARIANTS), 1)
    raise UserError(
      f"config key 'model.variant': {model.variant!r} is unknown; there are {', '.join(beit.VARIANTS)}"
      + (f"; did you mean {near[0]!r}?" if near else "")
    )
  try:
    fields = {
      **beit.VARIANTS[model.variant],
      **beit.preset_fields(model.preset, model.variant, pretrain=pretrain),
    }
  except ValueError as error:
    raise UserError(f"config key 'model.preset': {error}") from None
  own = {name: model[name] for name in encoder_schema() if name not in ("variant", "preset")}
  fields.update({name: value for name, value in own.items() if value is not None})
  fields["image_size"] = image_size
  patch = fields["patch_size"]
  if any(side % patch for side in image_size):
    raise UserError(
      f"config key 'data.image_size': {image_size} is not divisible by model.patch_size={patch}; choose e.g. "
      f"{tuple(max(round(side / patch), 1) * patch for side in image_size)}"
    )
  patches = math.prod(side // patch for side in image_size)
  if fields["rel_pos"] != "none" and patches > MAX_PATCHES:
    raise UserError(
      f"config key 'data.image_size': {image_size} has {patches:,} patches of model.patch_size={patch}; with relative "
      f"positions {MAX_PATCHES:,} are the most there can be (model.rel_pos='none' has no such limit)"
    )
  if int(fields["width"] * fields["mlp_ratio"]) < 1:
    raise UserError(
      f"config key 'model.mlp_ratio': {fields['mlp_ratio']} of model.width={fields['width']} is not even one unit"
    )
  if fields["width"] % fields["num_heads"]:
    raise UserError(
      f"config key 'model.num_heads': {fields['num_heads']} does not divide model.width={fields['width']}"
    )
  if fields["rel_pos"] not in ("shared", "per_block", "none"):
    raise UserError(
      f"config key 'model.rel_pos': {fields['rel_pos']!r} is unknown; there are 'shared', 'per_block' and 'none'"
    )
  asked, head_dim = fields["attention"], fields["width"] // fields["num_heads"]
  chosen, reason = attention.choose(asked, fields["dtype"], head_dim)
  if asked == "cudnn" != chosen:
    raise UserError(f"config key 'model.attention': 'cudnn' cannot run here ({reason}); use 'auto' or 'xla'")
  log.info("attention: %s (%s)", chosen, reason)
  return fields


def adapt_encoder(objective: Any, pretrained: Pretrained, shapes: Any, say: Callable[[str], None]) -> dict:
  """`Objective.adapt` for models with an encoder: see `transfer.encoder_params`.

  Raises:
    UserError: everything in which checkpoint and run disagree, with the config keys.
  """
  if pretrained.kind == "tokenizer":
    raise UserError(f"init_from: a {pretrained.kind} has no BEiT encoder to start from")
  have, want = pretrained.encoder_fields, objective.module.encoder
  problems = [
    f"model.{key}: the checkpoint has {have[key]!r}, this run {want[key]!r}"
    for key in ("patch_size", "width", "depth", "num_heads", "mlp_ratio", "abs_pos")
    if have[key] != want[key]
  ]
  for key, off in (("rel_pos", "none"), ("layer_scale_init", 0)):
    if (have[key] == off) != (want[key] == off):
      problems.append(f"model.{key}: the checkpoint has {have[key]!r}, this run {want[key]!r}")
  problems += disagreeing_pixels(objective.config.data, pretrained, say)
  if problems:
    raise UserError(
      "init_from: the checkpoint and this run disagree (set the keys in the config, or with --config.KEY=VALUE):\n  "
      + "\n  ".join(problems)
    )
  assumed = pretrained.description.get("assumed", ())
  data = {k: objective.config.data[k] for k in ("crop_pct", "interpolation", "resize")}
  for key, ours in data.items():
    theirs = pretrained.preprocessing[key]
    if ours != theirs and "preprocessing" not in assumed:
      say(f"warning: at evaluation the checkpoint has {key}={theirs!r}, this run {ours!r}")
  if have["norm_eps"] != want["norm_eps"]:
    say(f"norm_eps: {have['norm_eps']} in the checkpoint, {want['norm_eps']} here (model.norm_eps)")
  src_grid, dst_grid = (
    tuple(side // want["patch_size"] for side in size) for size in (have["image_size"], want["image_size"])
  )
  params = {"encoder": pretrained.params} if pretrained.kind == "backbone" else pretrained.params
  return transfer.encoder_params(params, shapes, src_grid, dst_grid, say)


def disagreeing_pixels(data: ConfigDict, pretrained: Pretrained, say: Callable[[str], None]) -> list[str]:
  """Lines on mean and std of a run and a checkpoint that differ; where the file does not say, a warning instead."""
  problems = []
  for key in ("mean", "std"):
    ours, theirs = (tuple(map(float, p[key])) for p in (data, pretrained.preprocessing))
    if ours != theirs and "preprocessing" in pretrained.description.get("assumed", ()):
      say(
        f"warning: data.{key} is {ours} here; the file does not say, models of its kind usually have {theirs}"
      )
    elif ours != theirs:
      problems.append(f"data.{key}: the checkpoint was trained with {theirs}, this run has {ours}")
  return problems
