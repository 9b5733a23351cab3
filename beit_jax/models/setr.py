"""The SETR-PUP decoder, with which Table 3 of the BEiT paper reports ADE20K results of the base model.

Follows the SETR authors' vit_up_head.py and mmseg's setr_up_head.py (num_convs 4, up_scale 2, 256 channels, no
dropout). Deliberate differences:
- The classifier runs before the last doubling, as in the authors' code; in mmseg it runs after it. A 1x1 convolution
  commutes with bilinear resizing, so the result is the same, and the largest map has C instead of 256 channels.
- An auxiliary head is one 3x3 conv-BN-ReLU and the classifier at the resolution of the patches. The only
  upsampling is that of the loss, which resizes the logits to the label. mmseg has two convolutions, each followed by
  a factor of 4; according to the authors of SETR, theirs upsamples once (mmsegmentation#721).
- Convolutions before BatchNorm have no bias, as in mmseg; the authors' have one, without effect.
Shapes: B = batch size, h, w = grid in patches, D = width, C = classes.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from beit_jax.models.convolutions import ConvModule, classify
from beit_jax.models.resampling import resize_bilinear

SETR_CHANNELS = 256
NORM_EPS = 1e-6


class SetrUpHead(nn.Module):
  """LayerNorm, `num_convs` times (3x3 conv, BN, ReLU, doubling of the resolution), and a classifier.

  Maps [B, h, w, D] to logits, float32 [B, s * h, s * w, C], with s = 2 ** num_convs, or s = 1 if `upsample` is off.
  """

  num_classes: int
  num_convs: int
  channels: int
  upsample: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    x = nn.LayerNorm(NORM_EPS, dtype=self.dtype, name="norm")(x)
    for i in range(self.num_convs):
      x = ConvModule(self.channels, 3, self.dtype, name=f"up_{i}")(x, train=train)
      if i == self.num_convs - 1:
        x = classify(x, self.num_classes, self.dtype)
      if self.upsample:
        x = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))
    return x


def setr_pup(
  taps: Sequence[jax.Array],
  num_classes: int,
  channels: int,
  aux_channels: int,
  dtype: jnp.dtype,
  *,
  train: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Applies `decode_head` to the last map and `auxiliary_head_0`... to the others; call it in a compact method.

  Args:
    taps: Maps [B, h, w, D], not normalized.
    num_classes: C.
    channels: Channels of the decode head.
    aux_channels: Channels of the auxiliary heads.
    dtype: Data type of the computation.
    train: Whether BatchNorm uses and updates batch statistics.

  Returns:
    Logits [B, 16h, 16w, C], and logits [B, h, w, C] for each of the other maps.
  """
  decode = SetrUpHead(num_classes, 4, channels, True, dtype, name="decode_head")
  aux = [
    SetrUpHead(num_classes, 1, aux_channels, False, dtype, name=f"auxiliary_head_{i}")
    for i in range(len(taps) - 1)
  ]
  pairs = zip(aux, taps[:-1], strict=True)
  return decode(taps[-1], train=train), tuple(head(x, train=train) for head, x in pairs)
