"""A model with its weights, as `beit_jax.load` returns it: what a notebook user holds in hand."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import beit_jax
from beit_jax import trees
from beit_jax.config import ranges
from beit_jax.data import images as images_lib
from beit_jax.errors import UserError
from beit_jax.models.beit import Beit, BeitForImageClassification, BeitForMaskedImageModeling
from beit_jax.models.dvae import Dvae
from beit_jax.models.resampling import resize_bilinear
from beit_jax.models.upernet import BeitForSemanticSegmentation

MODULES: dict[str, Callable[..., nn.Module]] = {
  "backbone": Beit,
  "mim": BeitForMaskedImageModeling,
  "classifier": BeitForImageClassification,
  "segmenter": BeitForSemanticSegmentation,
  "tokenizer": Dvae,
}


def fingerprint(params: Any, collections: Any = None) -> str:
  """sha256 of names, shapes and values: the same for the same weights, in whatever file they come."""
  digest = hashlib.sha256()
  for name, leaf in sorted({**trees.flatten(params), **trees.flatten(collections or {})}.items()):
    array = np.ascontiguousarray(leaf)
    digest.update(f"{name} {array.dtype} {array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def make_module(kind: str, fields: dict[str, Any]) -> nn.Module:
  """The Linen module of a description's `kind` and `module` (JSON: lists stand for tuples).

  Raises:
    UserError: a kind or a field that this version does not know, or a number outside its range: a stranger's
      description must not make anyone compute for hours, or fill the memory.
  """

  def thaw(value):
    if isinstance(value, dict):
      return {k: thaw(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value

  if kind == "linear_probe":
    raise UserError(
      "this run holds the heads of a linear probe without their encoder; load the encoder's run"
    )
  if not isinstance(kind, str) or kind not in MODULES:
    raise UserError(f"a checkpoint of kind {kind!r} is unknown to this version; it knows {sorted(MODULES)}")
  _check_fields(kind, thaw(fields))
  try:
    return MODULES[kind](**thaw(fields))
  except TypeError as error:
    raise UserError(f"the {kind} of this checkpoint has fields this version does not know: {error}") from None


def _check_fields(kind: str, fields: Any) -> None:
  encoder = fields.get("encoder", {}) if isinstance(fields, dict) else None
  if not isinstance(encoder, dict):
    raise UserError(f"the {kind} of this checkpoint has no fields that describe it")
  size = {"image_size": fields.get("image_size", encoder.get("image_size"))}
  for part in (fields, encoder):
    numbers = {name: value for name, value in part.items() if name not in ("encoder", "image_size")}
    try:
      ranges.check({"model": numbers, "data": size})
    except (TypeError, UserError) as error:
      text = re.sub("config key '(model|data).", "field '", str(error))
      raise UserError(f"the {kind} of this checkpoint cannot be: {text}") from None


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A loaded model.

  Attributes:
    kind: "backbone" | "mim" | "classifier" | "segmenter" | "tokenizer".
    params: nested dict of arrays.
    module: the Linen module.
    preprocessing: mean, std, image_size (h, w), crop_pct, interpolation, resize ("short_side" | "squash").
    description: what the checkpoint says of itself.
    collections: Linen collections besides the parameters: `batch_stats` of a segmenter.
  """

  kind: str
  params: dict[str, Any]
  module: nn.Module
  preprocessing: dict[str, Any]
  description: dict[str, Any] = dataclasses.field(default_factory=dict)
  collections: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    thawed = {k: tuple(v) if isinstance(v, list) else v for k, v in self.preprocessing.items()}
    object.__setattr__(self, "preprocessing", thawed)

  @property
  def encoder_fields(self) -> dict[str, Any]:
    """Fields of the BEiT encoder in this model (not of a tokenizer)."""
    self._need(("backbone", "mim", "classifier", "segmenter"), "encoder_fields")
    encoder = self.module if self.kind == "backbone" else Beit(**self.module.encoder)
    return {
      f.name: getattr(encoder, f.name) for f in dataclasses.fields(Beit) if f.name not in ("parent", "name")
    }

  def describe(self) -> dict[str, Any]:
    """The description that is saved with the weights, as JSON values."""
    names = [f.name for f in dataclasses.fields(self.module) if f.name not in ("parent", "name")]
    text = {
      "version": beit_jax.__version__,
      **self.description,
      "kind": self.kind,
      "module": {name: getattr(self.module, name) for name in names},
      "preprocessing": self.preprocessing,
    }
    return json.loads(json.dumps(text, default=str))

  @cached_property
  def _forward(self):
    module = self.module

    def run(params, x, mask):
      variables = {"params": params, **self.collections}
      if self.kind == "segmenter":
        return resize_bilinear(module.apply(variables, x)["logits"], x.shape[1:3])
      if self.kind == "tokenizer":
        return module.apply(variables, x, method="logits")
      if self.kind == "backbone":
        return module.apply(variables, x, mask)[0]
      return module.apply(variables, x, mask) if self.kind == "mim" else module.apply(variables, x)

    return jax.jit(run)

  def forward(self, x: Any, mask: Any = None) -> jax.Array:
    """Runs the model on float32 [B, H, W, 3], already normalised (a tokenizer: `map_pixels`'d).

    Args:
      mask: bool [B, h, w], True = masked; backbone and mim only.

    Returns:
      backbone: [B, 1 + N, D] after `norm`; mim: logits [B, N, V]; classifier: [B, C]; segmenter:
      [B, H, W, C]; tokenizer: [B, h, w, V].
    """
    if mask is not None and self.kind not in ("backbone", "mim"):
      raise UserError(f"a {self.kind} takes no mask")
    return self._forward(
      self.params, jnp.asarray(x, jnp.float32), None if mask is None else jnp.asarray(mask)
    )

  def preprocess(self, images: Any) -> jax.Array:
    """uint8 [B, H, W, 3], or float in [0, 1], any size -> normalised float32 of the model's size."""
    p = self.preprocessing
    pixels = np.stack([self._fit(np.asarray(image)) for image in images])
    return (jnp.asarray(pixels) - jnp.asarray(p["mean"])) / jnp.asarray(p["std"])

  def _fit(self, image: np.ndarray) -> np.ndarray:
    """One image to float32 [h, w, 3] in [0, 1]; floats are resized as floats."""
    p, size = self.preprocessing, tuple(self.preprocessing["image_size"])
    if image.dtype == np.uint8:
      views, how = {"image": (size, p["interpolation"])}, {name: p[name] for name in ("crop_pct", "resize")}
      return images_lib.eval_views(image, views, **how)["image"].astype(np.float32) / 255.0
    image = image.astype(np.float32)
    height, width = image.shape[:2]
    target = images_lib.eval_size((height, width), size, p["crop_pct"], p["resize"])
    if target != (height, width):
      resample = images_lib.RESAMPLE[p["interpolation"]]
      channels = [Image.fromarray(image[..., c]).resize(target[::-1], resample) for c in range(3)]
      image = np.stack([np.asarray(channel) for channel in channels], -1).clip(0, 1)
    top, left = round((target[0] - size[0]) / 2), round((target[1] - size[1]) / 2)
    return image[top : top + size[0], left : left + size[1]]

  def __call__(self, images: Any) -> jax.Array:
    """`forward` of `preprocess(images)`.

    A segmenter gives logits for the prepared view, at `image_size`; whole images by windows are what a run's evaluation
    does.
    """
    return self.forward(self.preprocess(images))

  def tokenize(self, images: Any) -> jax.Array:
    """Images as for `preprocess` -> visual tokens int32 [B, N], row-major. Tokenizers only."""
    self._need(("tokenizer",), "tokenize()")
    logits = self(images)
    return logits.argmax(-1).astype(jnp.int32).reshape(len(logits), -1)

  def decode(self, ids: Any) -> jax.Array:
    """Visual tokens int32 [B, N] -> images float32 [B, H, W, 3] in [0, 1]. Tokenizers with a decoder only."""
    self._need(("tokenizer",), "decode()")
    if "decoder" not in self.params:
      raise UserError(
        "this tokenizer was loaded without its decoder, so tokens cannot be turned into pictures"
      )
    grid = tuple(side // self.module.stride for side in self.preprocessing["image_size"])
    return self._decode(self.params, jnp.asarray(ids), grid)

  @cached_property
  def _decode(self):
    decode = lambda params, ids, grid: self.module.apply({"params": params}, ids, grid, method="decode")  # noqa: E731
    return jax.jit(decode, static_argnums=2)

  def _need(self, kinds: tuple[str, ...], what: str) -> None:
    if self.kind not in kinds:
      raise UserError(f"{what} needs a {' or '.join(kinds)}, this is a {self.kind}")
