"""Config keys and checks that every objective with a BEiT encoder shares."""

import difflib
import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from beit_jax import transfer
from beit_jax.config import parse as config_lib
from beit_jax.errors import UserError
from beit_jax.models import attention, beit
from beit_jax.objectives.base import module_fields
from beit_jax.runtime.logs import log
from beit_jax.weights.pretrained import Pretrained

MAX_PATCHES = 64 * 64  # with relative positions: their index has the square of that many entries


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
    **{name: config_lib.OptionalOf(kind) for name, kind in decided.items()},
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
