"""A model with its weights, as `beit_jax.load` returns it: what a notebook user holds in hand."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import beit_jax
from beit_jax import transfer, trees
from beit_jax.data import image_files
from beit_jax.data import images as images_lib
from beit_jax.data.pixels import PixelRule, to_channels
from beit_jax.data.resize import resize_with_pillow
from beit_jax.errors import BadImage, UserError
from beit_jax.models.beit import (
  Beit,
)
from beit_jax.models.features import (
  FEATURE_POOLS,
  bare_encoder,
  block_attention,
  block_tokens,
  point_attention,
)
from beit_jax.runtime.logs import log
from beit_jax.weights.kinds import KINDS, ModelKind, Variables, lists_to_tuples, module_fields


def fingerprint(params: Any, collections: Any = None) -> str:
  """sha256 of names, shapes and values: the same for the same weights, in whatever file they come."""
  digest = hashlib.sha256()
  for name, leaf in sorted({**trees.flatten(params), **trees.flatten(collections or {})}.items()):
    array = np.ascontiguousarray(leaf)
    digest.update(f"{name} {array.dtype} {array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A loaded model.

  Attributes:
    kind: "backbone" | "mim" | "mim_pixels" | "classifier" | "segmenter" | "tokenizer" | "vqkd".
    params: nested dict of arrays.
    module: the Linen module.
    preprocessing: mean, std, image_size (h, w), crop_pct, interpolation, resize ("short_side" | "squash"); value_range
      if the run set it.
    description: what the checkpoint says of itself.
    collections: Linen collections besides the parameters: `batch_stats` of a segmenter, `codebook` of a tokenizer.
  """

  kind: str
  params: dict[str, Any]
  module: nn.Module
  preprocessing: dict[str, Any]
  description: dict[str, Any] = dataclasses.field(default_factory=dict)
  collections: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    preprocessing = {key: lists_to_tuples(value) for key, value in self.preprocessing.items()}
    object.__setattr__(self, "preprocessing", preprocessing)

  def __repr__(self) -> str:
    """Three lines: what the model is, what it takes, where it comes from."""
    fields, p = module_fields(self.module), self.preprocessing
    if self.has_encoder:
      e = self.encoder_fields
      parts = [
        f"{e['depth']} blocks of width {e['width']}, {e['num_heads']} heads, patches of {e['patch_size']}"
      ]
    else:
      parts = [type(self.module).__name__]
    units = {"num_classes": "classes", "vocab_size": "words"}
    parts += [f"{fields[name]:,} {unit}" for name, unit in units.items() if name in fields]
    height, width = p["image_size"]
    numbers = [" ".join(f"{value:.4g}" for value in p[name]) for name in ("mean", "std")]
    source = self.description.get("path", "memory")
    step = f", step {self.description['step']}" if "step" in self.description else ""
    return (
      f"{self.kind}: {', '.join(parts)}; {trees.num_params(self.params):,} parameters\n"
      f"images: {height}x{width}x{len(p['mean'])}, mean {numbers[0]}, std {numbers[1]}\n"
      f"from: {source}{step}"
    )

  @property
  def spec(self) -> ModelKind:
    """The row of `KINDS` for this model."""
    return KINDS[self.kind]

  @property
  def takes_mask(self) -> bool:
    """Whether `forward` accepts a mask."""
    return self.spec.takes_mask

  @property
  def can_tokenize(self) -> bool:
    """Whether `tokenize` is available."""
    return self.spec.can_tokenize

  @property
  def can_decode(self) -> bool:
    """Whether `decode` is available: the model is a tokenizer and has a decoder to pixels."""
    return self.can_tokenize and self.spec.pixel_decoder in self.params

  @property
  def token_image_size(self) -> tuple[int, int] | None:
    """The image size for which a tokenizer was built; None: it takes any size that its stride divides."""
    return tuple(self.encoder_fields["image_size"]) if self.has_encoder else None

  @property
  def variables(self) -> Variables:
    """Parameters and collections, as `module.apply` takes them."""
    return {"params": self.params, **self.collections}

  @property
  def has_encoder(self) -> bool:
    """Whether there is a BEiT encoder in this model."""
    return self.spec.encoder_path is not None

  @property
  def encoder_fields(self) -> dict[str, Any]:
    """All fields of the BEiT encoder in this model, defaults included.

    Raises:
      UserError: the model has no BEiT encoder.
    """
    self._check_encoder()
    if self.spec.is_encoder:
      return module_fields(self.module)
    fields: Any = module_fields(self.module)["encoder"]
    return module_fields(Beit(**fields))

  @property
  def encoder_params(self) -> dict[str, Any]:
    """The parameters of the BEiT encoder in this model.

    Raises:
      UserError: the model has no BEiT encoder.
    """
    self._check_encoder()
    return self.params[self.spec.encoder_path] if self.spec.encoder_path else self.params

  @property
  def head_params(self) -> dict[str, Any]:
    """The parameters besides those of the encoder; empty for a backbone."""
    if self.spec.is_encoder:
      return {}
    return {name: value for name, value in self.params.items() if name != self.spec.encoder_path}

  @property
  def loaded(self) -> "Pretrained":
    """What `beit_jax.load` gives: the backbone of the teacher if there is one, else the model itself."""
    if not self.spec.teacher:
      return self
    params = self.collections[self.spec.teacher]["params"][self.spec.encoder_path]
    backbone, module = "backbone", Beit(**self.encoder_fields)
    facts = {"kind": backbone, "module": module_fields(module), "part_of": self.kind}
    return Pretrained(backbone, params, module, self.preprocessing, {**self.description, **facts})

  def describe(self) -> dict[str, Any]:
    """The description that is saved with the weights, as JSON values."""
    facts = {
      "version": beit_jax.__version__,
      **self.description,
      "kind": self.kind,
      "module": module_fields(self.module),
      "preprocessing": self.preprocessing,
    }
    return json.loads(json.dumps(facts, default=str))

  def forward(self, x: Any, mask: Any = None) -> jax.Array:
    """Runs the model on normalized images.

    Args:
      x: float32 [B, H, W, C], already normalized (for a tokenizer: after `map_pixels`, which is mean -0.125, std 1.25;
        for that of BEiT v2: in [-1, 1]).
      mask: bool [B, h, w] or [B, N], or [h, w] for all images; True = masked. Only for a backbone or a masked image
        model.

    Returns:
      float32. backbone: features [B, 1 + N, D] after `norm`; mim: logits [B, N, V] of every patch; mim_pixels: the
      pixels of every patch, [B, N, P * P * C] (see `BeitForPixelRecovery`); classifier: logits [B, C]; segmenter:
      logits [B, H, W, C]; tokenizer: logits [B, h, w, V] (of BEiT v2: negative squared distances to the words).

    Raises:
      UserError: the model takes no mask, or one of another shape.
    """
    x = jnp.asarray(x, jnp.float32)
    return self._forward(self.params, x, self._full_mask(mask, len(x)))

  def _full_mask(self, mask: Any, batch: int) -> jax.Array | None:
    """The mask as bool [B, h, w]; None stays None."""
    if mask is None:
      return None
    mask = jnp.asarray(mask)
    if not self.takes_mask:
      raise UserError(f"a {self.kind} takes no mask")
    height, width = self._grid_size
    shapes = [(batch, height, width), (batch, height * width), (height, width)]
    if mask.shape not in shapes or not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
      raise UserError(
        f"mask: {mask.dtype} {list(mask.shape)}; {batch} images with a grid of {height}x{width} patches need bool "
        f"{', '.join(str(list(shape)) for shape in shapes[:2])} or {list(shapes[2])}"
      )
    mask = mask.astype(bool)
    return jnp.broadcast_to(mask, shapes[0]) if mask.shape == shapes[2] else mask.reshape(shapes[0])

  @cached_property
  def _forward(self) -> Callable[..., jax.Array]:
    def run(params: Any, x: jax.Array, mask: jax.Array | None) -> jax.Array:
      return self.spec.forward(self.module, {"params": params, **self.collections}, x, mask)

    return jax.jit(run)

  @property
  def pixel_rule(self) -> PixelRule:
    """How the stored values of images become pixels."""
    return PixelRule(len(self.preprocessing["mean"]), self.preprocessing.get("value_range"))

  def preprocess(self, images: Any) -> jax.Array:
    """Prepares images as the checkpoint's `preprocessing` says.

    Args:
      images: an array [B, H, W, C], or one image, or a list of images. An image is an array [H, W, C], an image of
        Pillow or the path of a file, of any size. Arrays are uint8, or float in [0, 1], or deeper integers as
        `data.pixels.PixelRule` says. With a `value_range` in the preprocessing, all arrays hold stored values.

    Returns:
      float32 [B, h, w, C], normalized, of the model's image size.

    Raises:
      UserError: an image has another shape, or values that cannot be meant.
    """
    is_batch = isinstance(images, list | tuple) or np.ndim(images) == 4
    if is_batch and not len(images):
      raise UserError("images: none given, expected one or more")
    return self.normalize([self._pixels(image) for image in (images if is_batch else [images])])

  def _pixels(self, image: Any) -> np.ndarray:
    """The pixels of an image: uint8 [H, W, C], or float32 in [0, 1]."""
    try:
      if isinstance(image, str | os.PathLike):
        return image_files.read_image(Path(image), self.pixel_rule)
      image = image if isinstance(image, Image.Image) else np.asarray(image)
      if isinstance(image, np.ndarray) and image.dtype.kind not in "bui":
        image = to_channels(image, self.pixel_rule.channels)
        low, high = float(image.min()), float(image.max())
        if self.pixel_rule.value_range is None:
          if not (low >= 0 and high <= 1):
            raise ValueError(f"float values from {low:g} to {high:g}; expected [0, 1], or uint8")
          return image.astype(np.float32)
        if low >= 0 and 0 < high <= 1 and self.pixel_rule.value_range[1] > 2:
          raise ValueError(
            f"float values from {low:g} to {high:g}; expected stored values, {self.pixel_rule}"
          )
      return images_lib.decode(image, self.pixel_rule)
    except (ValueError, BadImage) as error:
      raise UserError(f"{image if isinstance(image, str | os.PathLike) else 'images'}: {error}") from None

  def normalize(self, images: Sequence[np.ndarray]) -> jax.Array:
    """Resizes and normalizes pixels.

    Args:
      images: uint8 [H, W, C], as `data.images.decode` returns them, or float32 in [0, 1]; of any size.

    Returns:
      float32 [B, h, w, C].
    """
    p, pixels = self.preprocessing, np.stack([self._fit(image) for image in images])
    return (jnp.asarray(pixels) - jnp.asarray(p["mean"])) / jnp.asarray(p["std"])

  def _fit(self, image: np.ndarray) -> np.ndarray:
    """Resizes and crops one image to float32 [h, w, C] in [0, 1]; float images are not rounded to uint8."""
    p, size = self.preprocessing, tuple(self.preprocessing["image_size"])
    if image.dtype == np.uint8:
      views, how = {"image": (size, p["interpolation"])}, {name: p[name] for name in ("crop_pct", "resize")}
      return images_lib.eval_views(image, views, **how)["image"].astype(np.float32) / 255.0
    height, width = image.shape[:2]
    target = images_lib.eval_size((height, width), size, p["crop_pct"], p["resize"])
    image = resize_with_pillow(image, target, p["interpolation"]).clip(0, 1)
    top, left = round((target[0] - size[0]) / 2), round((target[1] - size[1]) / 2)
    return image[top : top + size[0], left : left + size[1]]

  def __call__(self, images: Any) -> jax.Array:
    """Runs the model on images: `forward(preprocess(images))`.

    A segmenter returns logits of the prepared image, at `image_size`. Sliding windows over whole images are part of a
    run's evaluation and of `beit_jax.predict`.
    """
    return self.forward(self.preprocess(images))

  def at(self, image_size: int | tuple[int, int]) -> "Pretrained":
    """The same model for images of another size; relative-position tables and absolute positions are resampled.

    The rules are those of `init_from` for another image size (`beit_jax.transfer`).

    Args:
      image_size: pixels, one number or (height, width), multiples of the patch size.

    Raises:
      UserError: the model has no BEiT encoder, or its patches do not divide the size.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    patch = self.encoder_fields["patch_size"]
    if len(size) != 2 or any(not isinstance(side, int) or side < patch or side % patch for side in size):
      raise UserError(f"image_size={image_size}: expected one or two multiples of the patch size, {patch}")
    source, target = self._grid_size, (size[0] // patch, size[1] // patch)
    if self.encoder_fields["rel_pos"] != "none" and (target[0] < source[0] or target[1] < source[1]):
      log.warning(
        "at(%s): for a smaller grid the geometric rule crops the relative-position tables", image_size
      )
    if self.spec.is_encoder:
      module = self.module.clone(image_size=size)
    else:
      module = self.module.clone(encoder={**module_fields(self.module)["encoder"], "image_size": size})
    # The strides of sliding windows belong to the old size; without them, predictions use two thirds of a window.
    kept = {key: value for key, value in self.preprocessing.items() if key != "sliding"}
    params = transfer.resize_positions(self.params, source, target)
    description = {**self.description, "sha256": fingerprint(params, self.collections)}
    return dataclasses.replace(
      self,
      params=params,
      module=module,
      preprocessing={**kept, "image_size": size},
      description=description,
    )

  def features(
    self, images: Any, blocks: int | Sequence[int] | None = None, pool: str | None = None, *, mask: Any = None
  ) -> Any:
    """What the blocks of the encoder compute: the residual stream after each block, before any final norm.

    Args:
      images: as for `preprocess`.
      blocks: number of a block, counted from 0 (from the end if negative), or several; None: all blocks.
      pool: None, "cls", "mean" (of the patches) or "map".
      mask: as for `forward`.

    Returns:
      float32, for one number an array, otherwise a list of arrays. None: [B, 1 + N, D], cls token first, without
      register tokens; "cls" and "mean": [B, D]; "map": [B, h, w, D].

    Raises:
      UserError: the model has no BEiT encoder or takes no mask; a block or the pool does not exist.
    """
    self._check_encoder()
    if pool not in FEATURE_POOLS:
      raise UserError(f"pool={pool!r}: expected None or one of {', '.join(filter(None, FEATURE_POOLS))}")
    single = isinstance(blocks, int)
    chosen = range(self._depth) if blocks is None else [blocks] if isinstance(blocks, int) else blocks
    x = self.preprocess(images)
    numbers = tuple(map(self._block_number, chosen))
    found = self._block_tokens(self.encoder_params, x, self._full_mask(mask, len(x)), numbers, pool)
    return found[0] if single else found

  def attention(self, images: Any, block: int = -1, *, mask: Any = None) -> jax.Array:
    """The attention weights of one block.

    Args:
      images: as for `preprocess`.
      block: number of the block, counted from 0 (from the end if negative).
      mask: as for `forward`.

    Returns:
      float32 [B, K, T, T]: image, head, query, key; each row sums to 1. Tokens: cls, patches, register tokens.

    Raises:
      UserError: as for `features`.
    """
    self._check_encoder()
    x = self.preprocess(images)
    number = self._block_number(block)
    return self._block_attention(self.encoder_params, x, self._full_mask(mask, len(x)), number)

  def attention_map(
    self, images: Any, point: tuple[int, int], block: int = -1, *, mask: Any = None
  ) -> jax.Array:
    """Where the patch at a point looks: its attention to all patches, the mean over heads (BEiT paper, Figure 2).

    Args:
      images: as for `preprocess`.
      point: (y, x) in pixels of the prepared image, [h, w] of `preprocess`.
      block: as for `attention`.
      mask: as for `forward`.

    Returns:
      float32 [B, h, w], resized bilinearly to the prepared image.

    Raises:
      UserError: as for `features`; the point lies outside the image.
    """
    self._check_encoder()
    height, width = size = tuple(self.encoder_fields["image_size"])
    y, x = point
    if not (0 <= y < height and 0 <= x < width):
      raise UserError(f"point={point}: (y, x) lies outside the image of {height}x{width} pixels")
    patch, grid_size = self.encoder_fields["patch_size"], self._grid_size
    number = int(y // patch) * grid_size[1] + int(x // patch)
    return point_attention(self.attention(images, block, mask=mask), number, grid_size, size)

  @property
  def _grid_size(self) -> tuple[int, int]:
    height, width = self.encoder_fields["image_size"]
    return height // self.encoder_fields["patch_size"], width // self.encoder_fields["patch_size"]

  @property
  def _depth(self) -> int:
    depth: int = self.encoder_fields["depth"]
    return depth

  def _block_number(self, block: int) -> int:
    if not -self._depth <= block < self._depth:
      raise UserError(
        f"block {block}: this model has the blocks 0 to {self._depth - 1}, or -1 for the last one"
      )
    return block % self._depth

  @cached_property
  def _block_tokens(self) -> Callable[..., Any]:
    encoder = bare_encoder(self.encoder_fields, self.encoder_params)
    return jax.jit(functools.partial(block_tokens, encoder), static_argnums=(3, 4))

  @cached_property
  def _block_attention(self) -> Callable[..., jax.Array]:
    encoder = bare_encoder(self.encoder_fields, self.encoder_params)
    return jax.jit(functools.partial(block_attention, encoder), static_argnums=3)

  def tokenize(self, images: Any) -> jax.Array:
    """Turns images, as for `preprocess`, into visual tokens int32 [B, N] in row-major order.

    Raises:
      UserError: the model is not a tokenizer.
    """
    self._check_tokenizer("tokenize")
    logits = self(images)
    return logits.argmax(-1).astype(jnp.int32).reshape(len(logits), -1)

  def decode(self, ids: Any) -> jax.Array:
    """Turns visual tokens int32 [B, N] into images float32 [B, H, W, C] in [0, 1].

    Raises:
      UserError: the model is not a tokenizer, or was loaded without its decoder.
    """
    self._check_tokenizer("decode")
    if not self.can_decode:
      raise UserError(f"this tokenizer cannot turn tokens into images: {self.spec.without_pixel_decoder}")
    module: Any = self.module
    grid_size = tuple(side // module.stride for side in self.preprocessing["image_size"])
    return self._decode(self.variables, jnp.asarray(ids), grid_size)

  @cached_property
  def _decode(self) -> Callable[..., jax.Array]:
    def run(variables: Any, ids: jax.Array, grid_size: tuple[int, int]) -> Any:
      return self.module.apply(variables, ids, grid_size, method="decode")

    return jax.jit(run, static_argnums=2)

  def _check_encoder(self) -> None:
    if not self.has_encoder:
      raise UserError(f"a {self.kind} has no BEiT encoder")

  def _check_tokenizer(self, method: str) -> None:
    if not self.can_tokenize:
      raise UserError(f"{method}() needs a tokenizer, this is a {self.kind}")
