"""Semantic segmentation: the encoder with UPerNet (unilm's code) or SETR-PUP (Table 3 of the paper; see setr.py).

Follows unilm `beit/semantic_segmentation/backbone/beit.py` and mmseg 0.11 `uper_head.py`, `psp_head.py`,
`fcn_head.py`. Names in mmseg's checkpoints and here (`weight` is `kernel` of a convolution, `scale` of a norm):

  backbone.*                                     encoder/*, as in unilm's classification models
  backbone.fpn1.{0,1,3}                          fpn1/{up_0,bn,up_1}
  backbone.fpn2.0                                fpn2
  decode_head.psp_modules.I.1                    decode_head/psp_I
  decode_head.{lateral_convs,fpn_convs}.I        decode_head/{lateral,fpn}_I
  decode_head.{bottleneck,fpn_bottleneck}        the same
  auxiliary_head.convs.0                         auxiliary_head/conv_0
  {decode,auxiliary}_head.conv_seg               the same
  *.bn.running_{mean,var}                        {mean,var} in `batch_stats`
  decode_head.up_convs.I.0, auxiliary_head.J.*   decode_head/up_I, auxiliary_head_J/* (SETR)

Shapes: B = batch size, H, W = image size in pixels, h, w = grid in patches, D = width, C = classes.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beit_jax.models import setr
from beit_jax.models.beit import Beit
from beit_jax.models.convolutions import BatchNorm, ConvModule, TransposedConv, classify, drop_channels
from beit_jax.models.resampling import adaptive_average_pool, max_pool_2x2, resize_bilinear

POOL_SCALES = (1, 2, 3, 6)
AUX_LEVEL = 2  # the level of the auxiliary FCN head
OUT_INDICES = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}  # depth -> blocks whose outputs unilm uses, from 0
HEADS = ("upernet", "setr_pup")


def tapped_maps(
  out: dict[str, jax.Array], out_indices: tuple[int, ...], grid_size: tuple[int, int]
) -> list[jax.Array]:
  """Patch tokens after some blocks as maps, not normalized.

  Args:
    out: Residual stream after each block; the second output of `Beit`.
    out_indices: Numbers of blocks, from 0. Hugging Face transformers counts the embedding as block 0 and therefore
      takes other blocks for the same numbers.
    grid_size: (h, w).

  Returns:
    One map [B, h, w, D] per block.
  """
  tokens = [out[f"block_{i:02d}"][:, 1:] for i in out_indices]
  return [x.reshape(len(x), *grid_size, x.shape[-1]) for x in tokens]


class Upsample4(nn.Module):
  """Transposed convolution, BatchNorm, exact GELU and transposed convolution: [B, h, w, D] -> [B, 4h, 4w, D]."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    width = x.shape[-1]
    x = TransposedConv(width, self.dtype, name="up_0")(x)
    x = nn.gelu(BatchNorm(name="bn")(x, train=train), approximate=False)
    return TransposedConv(width, self.dtype, name="up_1")(x)


class UPerHead(nn.Module):
  """Pyramid pooling on the coarsest level, a top-down feature pyramid, and one classifier on all levels.

  Maps four levels [B, ., ., D], finest first, to logits, float32, at the size of the first level. Training needs the
  "dropout" rng.
  """

  num_classes: int
  channels: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, levels: Sequence[jax.Array], *, train: bool = False) -> jax.Array:
    def conv(name: str, x: jax.Array, kernel_size: int) -> jax.Array:
      return ConvModule(self.channels, kernel_size, self.dtype, name=name)(x, train=train)

    def pyramid_pooling(x: jax.Array) -> jax.Array:
      size = x.shape[1:3]
      pooled = [adaptive_average_pool(x, (scale, scale)) for scale in POOL_SCALES]
      pooled = [resize_bilinear(conv(f"psp_{i}", y, 1), size) for i, y in enumerate(pooled)]
      return conv("bottleneck", jnp.concatenate([x, *pooled], -1), 3)

    top = len(levels) - 1
    maps = [conv(f"lateral_{i}", levels[i], 1) for i in range(top)] + [pyramid_pooling(levels[top])]
    for i in range(top, 0, -1):
      maps[i - 1] = maps[i - 1] + resize_bilinear(maps[i], maps[i - 1].shape[1:3])
    maps = [conv(f"fpn_{i}", maps[i], 3) for i in range(top)] + maps[top:]
    maps = [resize_bilinear(x, maps[0].shape[1:3]) for x in maps]
    x = conv("fpn_bottleneck", jnp.concatenate(maps, -1), 3)
    return classify(drop_channels(x, train=train), self.num_classes, self.dtype)


class FcnHead(nn.Module):
  """One 3x3 ConvModule and the classifier: [B, h, w, D] -> logits float32 [B, h, w, C]."""

  num_classes: int
  channels: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    x = ConvModule(self.channels, 3, self.dtype, name="conv_0")(x, train=train)
    return classify(drop_channels(x, train=train), self.num_classes, self.dtype)


class BeitForSemanticSegmentation(nn.Module):
  """Encoder and a segmentation head: [B, H, W, 3] -> {"logits", "aux"}, float32.

  For patches of 16 pixels, the head "upernet" returns logits [B, H/4, W/4, C] and aux [B, H/16, W/16, C]; the head
  "setr_pup" returns logits [B, H, W, C] and as aux a tuple with [B, H/16, W/16, C] for each of `out_indices` but the
  last. Training needs the rngs "drop_path" and "dropout", and the collection "batch_stats" must be mutable.
  """

  encoder: dict[str, Any]
  num_classes: int = 150
  out_indices: tuple[int, ...] = (3, 5, 7, 11)  # blocks, from 0; large: (7, 11, 15, 23)
  channels: int | None = None  # of the decoder; None: width of the encoder for UPerNet, 256 for SETR
  aux_channels: int = 256
  head: str = "upernet"

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool = False) -> dict[str, Any]:
    encoder = Beit(**{**self.encoder, "use_mask_token": False, "final_norm": False}, name="encoder")
    self._check(encoder.depth)
    _, out = encoder(image, train=train)
    taps = tapped_maps(out, self.out_indices, encoder.grid_size)
    dtype = jnp.dtype(encoder.dtype)
    if self.head == "setr_pup":
      channels = self.channels or setr.SETR_CHANNELS
      logits, aux = setr.setr_pup(taps, self.num_classes, channels, self.aux_channels, dtype, train=train)
      return {"logits": logits, "aux": aux}
    levels = [
      Upsample4(dtype, name="fpn1")(taps[0], train=train),
      TransposedConv(encoder.width, dtype, name="fpn2")(taps[1]),
      taps[2],
      max_pool_2x2(taps[3]),
    ]
    decode_head = UPerHead(self.num_classes, self.channels or encoder.width, dtype, name="decode_head")
    aux_head = FcnHead(self.num_classes, self.aux_channels, dtype, name="auxiliary_head")
    return {"logits": decode_head(levels, train=train), "aux": aux_head(levels[AUX_LEVEL], train=train)}

  def _check(self, depth: int) -> None:
    if self.head not in HEADS:
      raise ValueError(f"head {self.head!r} is unknown; expected one of {', '.join(HEADS)}")
    indices = tuple(self.out_indices)
    if (
      len(indices) != 4 or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < depth
    ):
      raise ValueError(f"out_indices={indices} must be four increasing block numbers from 0 to {depth - 1}")
