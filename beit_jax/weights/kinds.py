"""The kinds of models, one row each, and the modules that a description names."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beit_jax.config import ranges
from beit_jax.errors import UserError
from beit_jax.models.beit import (
  Beit,
  BeitForImageClassification,
  BeitForMaskedImageModeling,
  BeitForPixelRecovery,
)
from beit_jax.models.dino import Dino
from beit_jax.models.dvae import Dvae
from beit_jax.models.resampling import resize_bilinear
from beit_jax.models.upernet import BeitForSemanticSegmentation
from beit_jax.models.vqkd import Vqkd

Variables = dict[str, Any]


def _features(module: nn.Module, variables: Variables, x: jax.Array, mask: jax.Array | None) -> Any:
  return module.apply(variables, x, mask)[0]


def _patch_outputs(module: nn.Module, variables: Variables, x: jax.Array, mask: jax.Array | None) -> Any:
  return module.apply(variables, x, mask)


def _class_logits(module: nn.Module, variables: Variables, x: jax.Array, mask: jax.Array | None) -> Any:
  del mask
  return module.apply(variables, x)


def _pixel_logits(module: nn.Module, variables: Variables, x: jax.Array, mask: jax.Array | None) -> Any:
  del mask
  output: Any = module.apply(variables, x)
  return resize_bilinear(output["logits"], (x.shape[1], x.shape[2]))


def _codebook_logits(module: nn.Module, variables: Variables, x: jax.Array, mask: jax.Array | None) -> Any:
  del mask
  return module.apply(variables, x, method="logits")


@dataclasses.dataclass(frozen=True)
class ModelKind:
  """One row of `KINDS`: what the program has to know about one kind of model.

  Attributes:
    module: the Linen module class; its fields are the `module` part of a checkpoint's description.
    forward: pure function `(module, variables, x, mask) -> output`; see `Pretrained.forward` for the shapes.
    formats: the formats that `beit_jax.save` can write.
    encoder_path: where the parameters of the BEiT encoder lie: a key of the parameter tree, "" for the whole tree (the
      model is the encoder itself), or None if the model has no BEiT encoder.
    takes_mask: the model accepts masked patches (and so has a mask token).
    can_tokenize: the model turns images into visual tokens.
    has_classes: the model predicts named classes, which its description lists as `labels`.
    has_pool: the module has the field `pool`, a key of `models.beit.POOLS`.
    has_collections: the model has Linen collections besides its parameters: `batch_stats`, or `codebook`.
    teacher: the collection whose `params` are used in place of those that are trained: `beit_jax.load` gives their
      encoder as a backbone; "" for none.
    pixel_decoder: the parameters of a tokenizer that turn visual tokens into pixels; a model may lack them.
    without_pixel_decoder: what a message says of a tokenizer without these.
    has_aggregation: the module has the fields of patch aggregation (BEiT v2).
    head: name of the output layer in unilm's checkpoints, or None.
    head_size: the module field that holds the number of outputs of `head`.
    tensor_names: the naming scheme of the model's tensors in foreign formats: "unilm", "mmseg", "dalle" or "vqkd".
    hf_class: name of the class in Hugging Face transformers, if the model type does not decide it
      (`hf_types.MODEL_TYPES`).
    hf_outside: beginnings of the names that are not inside the encoder in that class.
  """

  module: type[nn.Module]
  forward: Callable[[nn.Module, Variables, jax.Array, jax.Array | None], Any]
  formats: tuple[str, ...]
  encoder_path: str | None = "encoder"
  takes_mask: bool = False
  can_tokenize: bool = False
  has_classes: bool = False
  has_pool: bool = False
  has_collections: bool = False
  teacher: str = ""
  pixel_decoder: str = ""
  without_pixel_decoder: str = ""
  has_aggregation: bool = False
  head: str | None = None
  head_size: str | None = None
  tensor_names: str = "unilm"
  hf_class: str = ""
  hf_outside: tuple[str, ...] = ()

  @property
  def is_encoder(self) -> bool:
    """Whether the model is a BEiT encoder without a head."""
    return self.encoder_path == ""


KINDS: dict[str, ModelKind] = {
  "backbone": ModelKind(
    module=Beit,
    forward=_features,
    formats=("orbax", "unilm", "timm", "hf", "openmmlab"),
    encoder_path="",
    takes_mask=True,
    hf_outside=("",),
  ),
  "mim": ModelKind(
    module=BeitForMaskedImageModeling,
    forward=_patch_outputs,
    formats=("orbax", "unilm", "hf", "openmmlab"),
    takes_mask=True,
    has_aggregation=True,
    head="lm_head",
    head_size="vocab_size",
    hf_outside=("layernorm.", "lm_head."),
  ),
  "mim_pixels": ModelKind(
    module=BeitForPixelRecovery,
    forward=_patch_outputs,
    formats=("orbax",),
    takes_mask=True,
  ),
  "classifier": ModelKind(
    module=BeitForImageClassification,
    forward=_class_logits,
    formats=("orbax", "unilm", "timm", "hf", "openmmlab"),
    has_classes=True,
    has_pool=True,
    head="head",
    head_size="num_classes",
    hf_outside=("classifier.", "cls_classifier.", "distillation_classifier."),
  ),
  "segmenter": ModelKind(
    module=BeitForSemanticSegmentation,
    forward=_pixel_logits,
    formats=("orbax", "unilm", "hf", "openmmlab"),
    has_classes=True,
    has_collections=True,
    tensor_names="mmseg",
    hf_class="BeitForSemanticSegmentation",
  ),
  "tokenizer": ModelKind(
    module=Dvae,
    forward=_codebook_logits,
    formats=("orbax", "hf"),
    encoder_path=None,
    can_tokenize=True,
    pixel_decoder="decoder",
    without_pixel_decoder="it was loaded without its decoder; load a folder with both",
    tensor_names="dalle",
    hf_class="FlavaImageCodebook",
  ),
  "dino": ModelKind(
    module=Dino,
    forward=_class_logits,
    formats=("orbax",),
    has_collections=True,
    teacher="teacher",
  ),
  "vqkd": ModelKind(
    module=Vqkd,
    forward=_codebook_logits,
    formats=("orbax", "unilm"),
    can_tokenize=True,
    has_collections=True,
    pixel_decoder="pixel_decoder",
    without_pixel_decoder="it was trained without a decoder to pixels (configs/vqkd.py:pixels adds one)",
    tensor_names="vqkd",
  ),
}
# Kinds of runs whose checkpoints are not a model on their own, with the reason.
INCOMPLETE_KINDS = {
  "linear_probe": "this run holds the heads of a linear probe without their encoder; load the encoder's run",
}


def module_fields(module: nn.Module) -> dict[str, Any]:
  """The fields of a Linen module by name, without Linen's own `parent` and `name`."""
  names = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
  return {name: getattr(module, name) for name in names}


def make_module(kind: str, fields: dict[str, Any]) -> nn.Module:
  """The Linen module that a checkpoint's description names.

  Args:
    kind: a key of `KINDS`.
    fields: the module's fields; JSON lists stand for tuples.

  Raises:
    UserError: the kind or a field is unknown to this version, or a number is outside its range. Descriptions come
      from strangers: one must not start hours of computation or fill the memory.
  """
  spec = KINDS.get(kind) if isinstance(kind, str) else None
  if spec is None:
    unknown = f"unknown kind of checkpoint {kind!r}; this version knows {', '.join(sorted(KINDS))}"
    raise UserError(INCOMPLETE_KINDS.get(str(kind), unknown))
  fields = lists_to_tuples(fields)
  _check_fields(kind, fields)
  try:
    return spec.module(**fields)
  except TypeError as error:
    raise UserError(f"the {kind} of this checkpoint has fields this version does not know: {error}") from None


def variable_shapes(module: nn.Module, image_size: tuple[int, int]) -> dict[str, Any]:
  """The shapes of a module's variables, by collection; nothing is computed."""
  encoder = getattr(module, "encoder", None)
  channels = getattr(module, "in_channels", None) or dict(encoder or {}).get("in_channels", 3)
  image = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
  return dict(jax.eval_shape(module.init, jax.random.key(0), image))


def lists_to_tuples(value: Any) -> Any:
  """The value with tuples in place of lists, at every depth: JSON has no tuples."""
  if isinstance(value, dict):
    return {key: lists_to_tuples(entry) for key, entry in value.items()}
  return tuple(value) if isinstance(value, list) else value


def _check_fields(kind: str, fields: Any) -> None:
  encoder = fields.get("encoder", {}) if isinstance(fields, dict) else None
  if not isinstance(encoder, dict):
    raise UserError(f"the description of this checkpoint does not list the fields of its {kind}")
  size = {"image_size": fields.get("image_size", encoder.get("image_size"))}
  for part in (fields, encoder):
    numbers = {name: value for name, value in part.items() if name not in ("encoder", "image_size")}
    try:
      ranges.check({"model": numbers, "data": size})
    except (TypeError, UserError) as error:
      text = re.sub("config key '(model|data).", "field '", str(error))
      raise UserError(f"the {kind} of this checkpoint is not a valid model: {text}") from None
