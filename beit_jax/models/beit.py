"""The BEiT encoder, a masked ViT, and its models for masked image modeling and classification.

Follows unilm `beit/modeling_pretrain.py` and `beit/modeling_finetune.py`. Parameter names are the public interface of
checkpoints: `encoder/{patch_embed, cls_token, mask_token, pos_embed, rel_pos_bias, block_00..., norm}`, then `lm_head`
and, with patch aggregation, `head_block_00...`; or `pixel_head`; or `fc_norm` and `head`.
Shapes: as in layers.py; V = vocabulary size, C = classes, M = slots for masked patches.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.models.constrain import constrain_batch
from beit_jax.models.layers import (
  INITS,
  Block,
  Dense,
  PatchEmbed,
  RelPosBias,
  image_from_patches,
  patches_of,
  scaled_init,
)

# base and large: BEiT paper, Table 12. tiny and small are DeiT's sizes; BEiT was not released in them.
VARIANTS: dict[str, dict[str, Any]] = {
  "tiny": dict(width=192, depth=12, num_heads=3),
  "small": dict(width=384, depth=12, num_heads=6),
  "base": dict(width=768, depth=12, num_heads=12),
  "large": dict(width=1024, depth=24, num_heads=16),
}
LAYER_SCALE_INIT = {"large": 1e-5}  # 0.1 for all other variants (commands in unilm's README)


def preset_fields(preset: str, variant: str, *, pretrain: bool) -> dict[str, Any]:
  """Module fields of a preset.

  Args:
    preset: "plus" is what unilm released: LayerScale, and a relative-position bias that all blocks share in
      pre-training and each block has for itself afterwards. "paper" is Table 1 of the paper: absolute positions.
    variant: Key of `VARIANTS`.
    pretrain: Whether the model is for pre-training.

  Raises:
    ValueError: The preset is unknown.
  """
  if preset == "plus":
    layer_scale = LAYER_SCALE_INIT.get(variant, 0.1)
    return dict(rel_pos="shared" if pretrain else "per_block", abs_pos=False, layer_scale_init=layer_scale)
  if preset == "paper":
    return dict(rel_pos="none", abs_pos=True, layer_scale_init=0.0)
  raise ValueError(f"preset {preset!r} is unknown; expected 'plus' or 'paper'")


# The residual stream after each block, [B, T, D], and the shared attention bias -> tokens [B, T, D].
Branch = Callable[[dict[str, jax.Array], jax.Array | None], jax.Array]


class Beit(nn.Module):
  """The BEiT encoder."""

  image_size: tuple[int, int] = (224, 224)
  patch_size: int = 16
  in_channels: int = 3  # of the images
  width: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_ratio: float = 4.0
  rel_pos: str = "shared"  # "shared" | "per_block" | "none"
  abs_pos: bool = False
  layer_scale_init: float = 0.1  # 0: no LayerScale
  drop_path_rate: float = 0.0  # of the last block; rises linearly from 0 in the first
  use_mask_token: bool = True
  final_norm: bool = True
  norm_eps: float = 1e-6
  weight_init: str = "pretrain"  # "pretrain" | "finetune"; see layers.INITS
  dtype: str = "float32"  # of products and norms; parameters are float32
  residual_dtype: str = "float32"  # of the sums between the blocks
  remat: bool = False  # recompute the activations of the blocks in the backward pass
  scan: bool = False  # compile one block for all; the parameters stay one tree per block
  attention: str = "auto"  # "auto" | "xla" | "cudnn"; see attention.py
  # Of other ViTs, whose weights can be loaded:
  activation: str = "gelu"  # see layers.ACTIVATIONS
  pre_norm: bool = False  # CLIP: a norm before the first block
  register_tokens: int = 0  # DINOv2, DeiT's distillation token: tokens that are neither cls token nor patches

  @property
  def grid_size(self) -> tuple[int, int]:
    """(h, w) in patches."""
    return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    mask: jax.Array | None = None,
    *,
    train: bool = False,
    branch: Branch | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Encodes images.

    Args:
      image: Normalized float pixels [B, H, W, C].
      mask: bool [B, h, w], True = masked; or None.
      train: Turns on stochastic depth, which draws from the "drop_path" rng.
      branch: Further blocks of the caller. Their tokens pass the same `norm` and become `branch` of the second result.

    Returns:
      Tokens [B, 1 + N, D], cls token first and without register tokens, after `norm` (before it if `final_norm` is
      off); and the residual stream after each block, not normalized, in `residual_dtype`:
      `{"block_00": [B, 1 + N, D], ...}`.

    Raises:
      ValueError: The image has another size or other channels than the encoder, the mask is not on the grid, there is a
        mask and no mask token, or there are register tokens beside relative positions.
    """
    dtype, residual_dtype = jnp.dtype(self.dtype), jnp.dtype(self.residual_dtype)
    init = INITS[self.weight_init]
    if tuple(image.shape[1:]) != (*self.image_size, self.in_channels):
      expected = (*self.image_size, self.in_channels)
      raise ValueError(f"the encoder was built for images of {expected}, got {image.shape[1:]}")
    patch_embed = PatchEmbed(self.width, self.patch_size, self.weight_init, dtype, name="patch_embed")
    x = patch_embed(image).astype(residual_dtype)  # [B, N, D]
    if self.use_mask_token:
      mask_token = self.param("mask_token", init, (1, 1, self.width)).astype(residual_dtype)
      if mask is not None:  # before positions are added, so that masked patches keep theirs
        if mask.shape != (len(x), *self.grid_size):
          raise ValueError(f"{len(x)} images of {self.grid_size} patches cannot have a mask of {mask.shape}")
        x = jnp.where(mask.reshape(len(x), -1, 1), mask_token, x)
    elif mask is not None:
      raise ValueError("this encoder has no mask token, as it is fine-tuned; call it without a mask")
    cls_token = self.param("cls_token", init, (1, 1, self.width)).astype(residual_dtype)
    x = jnp.concatenate([jnp.broadcast_to(cls_token, (len(x), 1, self.width)), x], 1)  # [B, T, D]
    if self.abs_pos:
      x += self.param("pos_embed", init, (1, x.shape[1], self.width)).astype(residual_dtype)
    x = self._with_registers(x)
    if self.pre_norm:
      x = nn.LayerNorm(self.norm_eps, dtype=dtype, name="norm_pre")(x).astype(residual_dtype)
    bias = None
    if self.rel_pos == "shared":
      bias = RelPosBias(self.grid_size, self.num_heads, name="rel_pos_bias")()

    rates = np.linspace(0, self.drop_path_rate, self.depth).astype(np.float32)
    drops = train and self.drop_path_rate > 0
    keys = jax.random.split(self.make_rng("drop_path"), self.depth) if drops else None
    x = constrain_batch(x)
    if self.scan and not self.is_initializing():
      x, out = self._scan_blocks(x, bias, rates, keys)
    else:
      block_class = nn.remat(Block) if self.remat else Block
      out = {}
      for i in range(self.depth):
        block = block_class(**self.block_fields(i), name=f"block_{i:02d}")
        x = out[f"block_{i:02d}"] = block(x, bias, rates[i], None if keys is None else keys[i])
    if branch is not None:
      out["branch"] = branch(out, bias)
    if self.final_norm:
      norm = nn.LayerNorm(self.norm_eps, dtype=dtype, name="norm")
      x = norm(x)
      if branch is not None:
        out["branch"] = norm(out["branch"])
    return self._without_registers(x, out)

  def _with_registers(self, x: jax.Array) -> jax.Array:
    """Appends the register tokens. Without positions, attention does not depend on the order."""
    if not self.register_tokens:
      return x
    if self.rel_pos != "none":
      raise ValueError("register tokens have no relative positions; use rel_pos='none'")
    shape = (1, self.register_tokens, self.width)
    registers = self.param("register_tokens", INITS[self.weight_init], shape).astype(x.dtype)
    return jnp.concatenate([x, jnp.broadcast_to(registers, (len(x), *shape[1:]))], 1)

  def _without_registers(
    self, x: jax.Array, out: dict[str, jax.Array]
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Takes the register tokens off both outputs; the normalized ones become `registers` of the second."""
    if not self.register_tokens:
      return x, out
    count = x.shape[1] - self.register_tokens
    out = {name: tokens[:, :count] for name, tokens in out.items()}
    return x[:, :count], {**out, "registers": x[:, count:]}

  def block_fields(self, i: int) -> dict[str, Any]:
    """The fields of the block with number `i`, counted from 0."""
    return dict(
      width=self.width,
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      layer=i + 1,
      weight_init=self.weight_init,
      layer_scale_init=self.layer_scale_init,
      norm_eps=self.norm_eps,
      dtype=jnp.dtype(self.dtype),
      grid_size=self.grid_size if self.rel_pos == "per_block" else None,
      attention=self.attention,
      activation=self.activation,
    )

  def _scan_blocks(
    self, x: jax.Array, bias: jax.Array | None, rates: np.ndarray, keys: jax.Array | None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs the blocks as one `jax.lax.scan` over their stacked parameters, so that XLA compiles one block only."""
    names = [f"block_{i:02d}" for i in range(self.depth)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(self.variables["params"][n] for n in names))
    block = Block(**self.block_fields(0), parent=None)

    def step(x: jax.Array, xs: Any) -> tuple[Any, Any]:
      block_params, rate, key = xs
      out = block.apply({"params": block_params}, x, bias, rate, key)
      return out, out

    step = jax.checkpoint(step, prevent_cse=False) if self.remat else step
    x, stacked = jax.lax.scan(step, x, (params, rates, keys))
    return x, {name: stacked[i] for i, name in enumerate(names)}


def masked_slots(mask: jax.Array, num_slots: int) -> tuple[jax.Array, jax.Array]:
  """Positions of the masked patches in a fixed number of slots.

  Args:
    mask: bool [B, h, w], True = masked. At most `num_slots` patches of an image are masked.
    num_slots: M.

  Returns:
    Indices into the N patches in row-major order, int32 [B, M]; and weights, float32 [B, M]: 1 for a masked patch, 0
    for an unused slot.
  """
  flat = mask.reshape(len(mask), -1)
  index = jnp.argsort(~flat, axis=1, stable=True)[:, :num_slots]
  return index, jnp.take_along_axis(flat, index, 1).astype(jnp.float32)


class BeitForMaskedImageModeling(nn.Module):
  """Encoder and vocabulary head, optionally with the patch aggregation of BEiT v2.

  Patch aggregation: `head_blocks` further blocks see the cls token of the last block and the patch tokens of an earlier
  one, and predict the same visual tokens. The cls token must therefore gather what these patch tokens lack. The blocks
  share the encoder's `norm` and bias table, and are dropped after pre-training.

  References:
    BEiT v2 paper (arXiv 2208.06366), section 2.3; unilm `beit2/modeling_pretrain.py`.
  """

  encoder: dict[str, Any]
  vocab_size: int = 8192
  early_block: int = 0  # patch aggregation takes the patch tokens after this block, counted from 1
  head_blocks: int = 0  # 0: no patch aggregation
  shared_lm_head: bool = True  # the aggregated tokens use `lm_head` too; False: they have `head_lm_head`

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    mask: jax.Array | None = None,
    *,
    slots: jax.Array | None = None,
    train: bool = False,
    aggregated: bool = False,
  ) -> Any:
    """Predicts visual tokens.

    Args:
      image: Normalized float pixels [B, H, W, 3].
      mask: bool [B, h, w], True = masked; or None.
      slots: int32 [B, M], the patches to predict. The head then runs on these only, which saves 62 % of its work for
        75 of 196 patches. None: all patches.
      train: Turns on stochastic depth.
      aggregated: Return the predictions of patch aggregation, too.

    Returns:
      Logits float32 [B, M, V], or [B, N, V] without `slots`; with `aggregated` a pair of such logits.
    """
    encoder = Beit(**self.encoder, name="encoder")
    branch = self._aggregation(encoder, train) if self.head_blocks else None
    x, out = encoder(image, mask, train=train, branch=branch)
    init, dtype = INITS[encoder.weight_init], jnp.dtype(encoder.dtype)
    head = Dense(self.vocab_size, init, dtype, name="lm_head")
    logits = _predict_patches(head, x, slots)
    if branch is None:
      return logits
    if not self.shared_lm_head:
      head = Dense(self.vocab_size, init, dtype, name="head_lm_head")
    others = _predict_patches(head, out["branch"], slots)
    return (logits, others) if aggregated else logits

  def _aggregation(self, encoder: Beit, train: bool) -> Branch:
    """The blocks of patch aggregation. They have the initial values and drop rates of blocks after the early one."""
    if not 1 <= self.early_block <= encoder.depth:
      raise ValueError(
        f"early_block={self.early_block} is none of the {encoder.depth} blocks, counted from 1"
      )
    numbers = range(self.early_block, self.early_block + self.head_blocks)
    rates = np.linspace(0, encoder.drop_path_rate, max(encoder.depth, numbers.stop)).astype(np.float32)
    drops = train and encoder.drop_path_rate > 0
    keys = jax.random.split(self.make_rng("drop_path"), self.head_blocks) if drops else None
    block_class = nn.remat(Block) if encoder.remat else Block
    blocks = [
      block_class(**encoder.block_fields(number), name=f"head_block_{i:02d}")
      for i, number in enumerate(numbers)
    ]

    def branch(out: dict[str, jax.Array], bias: jax.Array | None) -> jax.Array:
      last, early = (out[f"block_{count - 1:02d}"] for count in (encoder.depth, self.early_block))
      x = jnp.concatenate([last[:, :1], early[:, 1:]], 1)
      for i, block in enumerate(blocks):
        x = block(x, bias, rates[numbers[i]], None if keys is None else keys[i])
      return x

    return branch


def _predict_patches(head: nn.Module, x: jax.Array, slots: jax.Array | None) -> jax.Array:
  """Applies a head to patch tokens: [B, 1 + N, D] -> float32 [B, N, outputs], or [B, M, outputs] with `slots`."""
  x = x[:, 1:]
  if slots is not None:
    x = jnp.take_along_axis(x, slots[..., None], axis=1)  # [B, M, D]
  return constrain_batch(head(x).astype(jnp.float32))


PATCH_EPS = 1e-6  # added to the variance of a patch, so that one of a single color becomes 0


class BeitForPixelRecovery(nn.Module):
  """Encoder and a head that predicts the pixels of patches: the BEiT paper's ablation "without visual tokens".

  References:
    BEiT paper, Table 4, which does not say how pixels are scaled. Normalization per patch is that of MAE (arXiv
    2111.06377), with the variance over all values of a patch, where MAE's code divides by one less.
  """

  encoder: dict[str, Any]
  normalize_patches: bool = False  # targets have mean 0 and variance 1 in each patch

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    mask: jax.Array | None = None,
    *,
    slots: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Predicts pixels.

    Args: as `BeitForMaskedImageModeling`.

    Returns:
      float32 [B, M, P * P * C], or [B, N, P * P * C] without `slots`: predictions of `targets`.
    """
    encoder = Beit(**self.encoder, name="encoder")
    x, _ = encoder(image, mask, train=train)
    outputs = encoder.patch_size**2 * encoder.in_channels
    head = Dense(outputs, INITS[encoder.weight_init], jnp.dtype(encoder.dtype), name="pixel_head")
    return _predict_patches(head, x, slots)

  @nn.nowrap
  def targets(self, image: jax.Array) -> jax.Array:
    """The pixels to predict: normalized images [B, H, W, C] -> float32 [B, N, P * P * C]."""
    patches = patches_of(image, self.encoder["patch_size"])
    if not self.normalize_patches:
      return patches
    mean, std = _patch_statistics(patches)
    return (patches - mean) / std

  @nn.nowrap
  def recovered(self, predicted: jax.Array, image: jax.Array) -> jax.Array:
    """The image that predictions stand for, [B, H, W, C], normalized as `image`.

    Args:
      predicted: [B, N, P * P * C].
      image: [B, H, W, C], whose patches give mean and variance if the model predicts normalized patches.
    """
    patch = self.encoder["patch_size"]
    if self.normalize_patches:
      mean, std = _patch_statistics(patches_of(image, patch))
      predicted = predicted * std + mean
    return image_from_patches(predicted, image.shape, patch)


def _patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation of each patch, [B, N, 1]."""
  return patches.mean(-1, keepdims=True), jnp.sqrt(patches.var(-1, keepdims=True) + PATCH_EPS)


# Which tokens the classifier's head sees, concatenated. "mean" is the mean of the patch tokens.
POOLS: dict[str, tuple[str, ...]] = {
  "mean": ("mean",),  # of tokens without a norm; then `fc_norm`
  "plain_mean": ("mean",),  # without any norm (transformers' CLIPForImageClassification)
  # The others are tokens after `norm`:
  "cls": ("cls",),
  "norm_mean": ("mean",),  # some of timm's ViTs
  "cls_mean": ("cls", "mean"),  # DINOv2
  "cls_registers": ("cls", "registers"),  # DeiT with a distillation token
}


class BeitForImageClassification(nn.Module):
  """Encoder and classifier: [B, H, W, 3] -> logits float32 [B, C]."""

  encoder: dict[str, Any]
  num_classes: int = 1000
  pool: str = "mean"  # one of `POOLS`
  head_init_scale: float = 0.001  # factor of the head's initial kernel (unilm --init_scale)

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    fields = {**self.encoder, "use_mask_token": False, "final_norm": self.pool not in ("mean", "plain_mean")}
    encoder = Beit(**fields, name="encoder")
    x, out = encoder(image, train=train)
    x = x.astype(jnp.float32)  # bfloat16 would lose digits of the mean of 196 tokens
    parts = {"cls": x[:, 0], "mean": x[:, 1:].mean(1)}
    if encoder.register_tokens:
      parts["registers"] = out["registers"].astype(jnp.float32).reshape(len(x), -1)
    x = jnp.concatenate([parts[part] for part in POOLS[self.pool]], -1)
    if self.pool == "mean":
      x = nn.LayerNorm(encoder.norm_eps, name="fc_norm")(x)
    init = scaled_init(INITS[encoder.weight_init], self.head_init_scale)
    return constrain_batch(nn.Dense(self.num_classes, kernel_init=init, name="head")(x))
