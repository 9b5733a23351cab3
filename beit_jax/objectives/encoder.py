"""What all objectives with a BEiT encoder share: config keys, their checks, and the start from a checkpoint."""

import abc
import difflib
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from beit_jax import augment, transfer
from beit_jax.config.defaults import OptionalOf
from beit_jax.config.parse import pair
from beit_jax.data.images import ViewSizes
from beit_jax.errors import UserError
from beit_jax.models import attention, beit
from beit_jax.objectives.base import (
  Array,
  Batch,
  Objective,
  PyTree,
  Variables,
  abstract_model,
  field_values,
  image_preprocessing,
  module_fields,
)
from beit_jax.runtime.logs import log
from beit_jax.weights.pretrained import Pretrained

MAX_PATCHES = 64 * 64  # with relative positions, whose index has the square of that many entries
# Fields that the variant or the preset decides unless the config sets them.
DECIDED = dict(width=int, depth=int, num_heads=int, rel_pos=str, abs_pos=bool, layer_scale_init=float)
# Fields that are not config keys: the objective sets them.
INTERNAL = ("image_size", "use_mask_token", "final_norm", "weight_init", "init")


# Fields in which a checkpoint must agree with the run that starts from it.
SHARED_FIELDS = (
  "patch_size",
  "width",
  "depth",
  "num_heads",
  "mlp_ratio",
  "abs_pos",
  "pre_norm",
  "register_tokens",
)


class EncoderObjective(Objective):
  """Base class of objectives whose `module` has an encoder and sees images of `data.image_size`.

  A subclass must give `kind`, `config_section`, `make_module`, `expected_outputs`, `loss` and `eval_step`, set `module`
  in `__init__`, and name in `augmentations` those that it uses.
  """

  @classmethod
  @abc.abstractmethod
  def make_module(cls, model: ConfigDict, image_size: tuple[int, int], outputs: int) -> nn.Module:
    """The module that the config's `model` section describes; `outputs` is the number of classes or words."""

  @classmethod
  @abc.abstractmethod
  def expected_outputs(cls, config: ConfigDict) -> int:
    """The number of classes or words, as far as the config alone says it."""

  @classmethod
  def expected_result(cls, config: ConfigDict) -> Pretrained:
    size = pair(config.data.image_size, "data.image_size")
    module = cls.make_module(config.model, size, cls.expected_outputs(config))
    return abstract_model(cls.kind, module, size, image_preprocessing(config.data, size))

  def views(self) -> ViewSizes:
    return {"image": (self.image_size, self.config.data.interpolation)}

  @property
  def depth(self) -> int:
    return self.module.encoder["depth"]

  def init(self, key: Array) -> Variables:
    return self._init_module(key, self.image_size)

  def normalized_image(self, batch: Batch, *, train: bool) -> Array:
    """The normalized images of a batch, float32 [B, H, W, 3]; in training with all augmentations."""
    data = self.config.data
    views = {"image": augment.to_float(batch["image"])}
    views = self.augmented(views, batch) if train else views
    views = {"image": augment.normalize(views["image"], data.mean, data.std)}
    views = self.augmented(views, batch, normalized=True) if train else views
    return views["image"]

  def describe(self) -> dict[str, Any]:
    preprocessing = self.image_preprocessing()
    return dict(kind=self.kind, module=field_values(self.module), preprocessing=preprocessing)

  def adapt(self, pretrained: Pretrained, shapes: PyTree) -> dict[str, Any]:
    return adapt_encoder(self.config.data, self.module.encoder, pretrained, shapes, log.info)


def encoder_schema() -> dict[str, Any]:
  """The `model` keys of every objective with a BEiT encoder, with their defaults."""
  fields = module_fields(beit.Beit, without=INTERNAL)
  decided = {name: OptionalOf(kind) for name, kind in DECIDED.items()}
  return {"variant": "base", "preset": "plus", **fields, **decided}


def head_schema(module: type[nn.Module]) -> dict[str, Any]:
  """The `model` keys of a module with an encoder and a head."""
  return {**encoder_schema(), **module_fields(module, without=("encoder",))}


def encoder_fields(model: ConfigDict, image_size: tuple[int, int], *, pretrain: bool) -> dict[str, Any]:
  """Turns the config's `model` section into the fields of `models.beit.Beit`.

  Args:
    model: the section.
    image_size: (height, width) in pixels.
    pretrain: whether the preset's relative positions are those of pre-training (one table that all blocks share).

  Raises:
    UserError: fields do not fit each other or the image, or the attention that was asked for cannot run here.
  """
  if model.variant not in beit.VARIANTS:
    near = difflib.get_close_matches(model.variant, list(beit.VARIANTS), 1)
    raise UserError(
      f"config key 'model.variant': {model.variant!r} is unknown; there are {', '.join(beit.VARIANTS)}"
      + (f"; did you mean {near[0]!r}?" if near else "")
    )
  preset = beit.preset_fields(model.preset, model.variant, pretrain=pretrain)
  keys = encoder_schema().keys() - {"variant", "preset"}
  given = {name: model[name] for name in keys if model[name] is not None}
  fields = {**beit.VARIANTS[model.variant], **preset, **given, "image_size": image_size}
  _check_sizes(fields)
  requested, head_dim = fields["attention"], fields["width"] // fields["num_heads"]
  chosen, reason = attention.choose_implementation(requested, fields["dtype"], head_dim)
  if requested == "cudnn" != chosen:
    raise UserError(f"config key 'model.attention': 'cudnn' cannot run here ({reason}); use 'auto' or 'xla'")
  check_dtype(fields["dtype"])
  log.info("attention: %s (%s)", chosen, reason)
  return fields


def check_dtype(dtype: str) -> None:
  """Raises a UserError if attention cannot run here in a dtype."""
  if dtype == "float16" and jax.default_backend() == "cpu":
    raise UserError(
      "config key 'model.dtype': JAX has no float16 attention on a CPU; use 'bfloat16' or 'float32'"
    )


def _check_sizes(fields: dict[str, Any]) -> None:
  image_size, patch = fields["image_size"], fields["patch_size"]
  if any(side % patch for side in image_size):
    raise UserError(
      f"config key 'data.image_size': {image_size} is not divisible by model.patch_size={patch}; choose e.g. "
      f"{tuple(max(round(side / patch), 1) * patch for side in image_size)}"
    )
  patches = math.prod(side // patch for side in image_size)
  if fields["rel_pos"] != "none" and patches > MAX_PATCHES:
    raise UserError(
      f"config key 'data.image_size': {image_size} has {patches:,} patches of model.patch_size={patch}; with relative "
      f"positions at most {MAX_PATCHES:,} are possible (model.rel_pos='none' has no such limit)"
    )
  if fields["register_tokens"] and fields["rel_pos"] != "none":
    raise UserError(
      f"config key 'model.register_tokens': {fields['register_tokens']} register tokens need model.rel_pos='none', "
      f"found {fields['rel_pos']!r}"
    )
  if int(fields["width"] * fields["mlp_ratio"]) < 1:
    raise UserError(
      f"config key 'model.mlp_ratio': {fields['mlp_ratio']} of model.width={fields['width']} is less than one unit"
    )
  if fields["width"] % fields["num_heads"]:
    raise UserError(
      f"config key 'model.num_heads': {fields['num_heads']} does not divide model.width={fields['width']}"
    )


def adapt_encoder(
  data: ConfigDict,
  encoder: dict[str, Any],
  pretrained: Pretrained,
  shapes: PyTree,
  report: Callable[[str], None],
) -> dict[str, Any]:
  """Takes the parameters of a checkpoint that fit a model with an encoder; see `transfer.encoder_params`.

  Args:
    data: the config's `data` section.
    encoder: the fields of the run's encoder.
    pretrained: the checkpoint.
    shapes: the run's parameters, or their shapes.
    report: is called with a line about everything that differs without being an error.

  Returns:
    Parameters by flat name.

  Raises:
    UserError: checkpoint and run disagree; names every config key.
  """
  if not pretrained.has_encoder:
    raise UserError(f"init_from: a {pretrained.kind} has no BEiT encoder to start from")
  found = pretrained.encoder_fields
  problems = [
    f"model.{key}: the checkpoint has {found[key]!r}, this run {encoder[key]!r}"
    for key in SHARED_FIELDS
    if found[key] != encoder[key]
  ]
  if found["activation"] != encoder["activation"] and "activation" not in pretrained.description.get(
    "assumed", ()
  ):
    problems.append(
      f"model.activation: the checkpoint has {found['activation']!r}, this run {encoder['activation']!r}"
    )
  for key, off in (("rel_pos", "none"), ("layer_scale_init", 0)):
    if (found[key] == off) != (encoder[key] == off):
      problems.append(f"model.{key}: the checkpoint has {found[key]!r}, this run {encoder[key]!r}")
  problems += normalization_problems(data, pretrained, report)
  if problems:
    raise UserError(
      "init_from: the checkpoint and this run disagree (set the keys in the config, or with --config.KEY=VALUE):\n  "
      + "\n  ".join(problems)
    )
  for key in ("crop_pct", "interpolation", "resize"):
    theirs = pretrained.preprocessing[key]
    if data[key] != theirs and "preprocessing" not in pretrained.description.get("assumed", ()):
      report(f"warning: at evaluation the checkpoint has {key}={theirs!r}, this run {data[key]!r}")
  if found["norm_eps"] != encoder["norm_eps"]:
    report(f"norm_eps: {found['norm_eps']} in the checkpoint, {encoder['norm_eps']} here (model.norm_eps)")
  src_grid, dst_grid = (
    tuple(side // encoder["patch_size"] for side in fields["image_size"]) for fields in (found, encoder)
  )
  params = {"encoder": pretrained.encoder_params, **pretrained.head_params}
  return transfer.encoder_params(params, shapes, src_grid, dst_grid, report)


def normalization_problems(
  data: ConfigDict, pretrained: Pretrained, report: Callable[[str], None]
) -> list[str]:
  """Lines on `data.mean` and `data.std` if a run and a checkpoint differ; a warning where the file says nothing."""
  problems: list[str] = []
  if len(data.mean) != len(pretrained.preprocessing["mean"]):  # those of other channels do not apply
    return problems
  for key in ("mean", "std"):
    ours, theirs = (tuple(map(float, p[key])) for p in (data, pretrained.preprocessing))
    if ours == theirs:
      continue
    if "preprocessing" in pretrained.description.get("assumed", ()):
      report(
        f"warning: data.{key} is {ours} here; the file does not say, models of its kind usually have {theirs}"
      )
    else:
      problems.append(f"data.{key}: the checkpoint was trained with {theirs}, this run has {ours}")
  return problems
