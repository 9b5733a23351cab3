"""The SETR-PUP decoder, which Table 3 of the BEiT paper uses (its ADE20K numbers of the base model).

Follows the SETR authors' vit_up_head.py and mmseg's setr_up_head.py (num_convs 4, up_scale 2, 256 channels, no
dropout). What differs on purpose:
- The classifier runs before the last doubling, as in the authors' code; mmseg runs it after. A 1x1 convolution
  and bilinear resizing commute, so the result is the same and the largest map has C instead of 256 channels.
- An auxiliary head is LayerNorm, one 3x3 conv-BN-ReLU and the classifier at the resolution of the patches; the
  loss resizes its logits to the label, which is the only upsampling. mmseg has two convolutions with x4 after
  each; the authors of SETR say that theirs upsamples once (mmsegmentation#721).
- No biases before BatchNorm, where they have no effect (mmseg has none, the authors' code has them).
Letters: B batch, h w grid in patches, D width, C classes.
"""

import flax.linen as nn
import jax.numpy as jnp

from beit_jax.models.convolutions import ConvModule, classify
from beit_jax.models.resampling import resize_bilinear

SETR_CHANNELS = 256
NORM_EPS = 1e-6


class SetrUpHead(nn.Module):
  """LayerNorm, then `num_convs` times (3x3 conv, BN, ReLU), each followed by a doubling; classifier.

  [B, h, w, D] -> logits float32 [B, s * h, s * w, C]; s = 2 ** num_convs, or 1 with `upsample` off.
  """

  num_classes: int
  num_convs: int
  channels: int
  upsample: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    x = nn.LayerNorm(NORM_EPS, dtype=self.dtype, name="norm")(x)
    for i in range(self.num_convs):
      x = ConvModule(self.channels, 3, self.dtype, name=f"up_{i}")(x, train=train)
      if i == self.num_convs - 1:
        x = classify(x, self.num_classes, self.dtype)
      if self.upsample:
        x = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))
    return x


def setr_pup(taps, num_classes, channels, aux_channels, dtype, *, train):
  """`decode_head` on the last tap, `auxiliary_head_0`... on the others. To be called in a compact method.

  Args:
    taps: maps [B, h, w, D], not normalised.

  Returns:
    logits [B, 16h, 16w, C], and a tuple with logits [B, h, w, C] for every other tap.
  """
  decode = SetrUpHead(num_classes, 4, channels, True, dtype, name="decode_head")
  aux = [
    SetrUpHead(num_classes, 1, aux_channels, False, dtype, name=f"auxiliary_head_{i}")
    for i in range(len(taps) - 1)
  ]
  pairs = zip(aux, taps[:-1], strict=True)
  return decode(taps[-1], train=train), tuple(head(x, train=train) for head, x in pairs)
