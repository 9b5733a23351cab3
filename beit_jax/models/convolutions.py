"""Layers that the segmentation heads share. Follows mmcv's ConvModule and PyTorch's SyncBatchNorm and ConvTranspose2d.

Shapes: B = batch size, H, W = size of the map, C = input channels, O = output channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.models.constrain import constrain_batch
from beit_jax.models.layers import Conv, add_bias, product, uniform_init

BN_EPS = 1e-5
BN_DECAY = 0.9  # PyTorch's momentum 0.1
DROPOUT = 0.1


class BatchNorm(nn.Module):
  """Batch normalization over (B, H, W) in float32, [B, H, W, C] -> [B, H, W, C].

  The running `mean` and `var` are in the collection `batch_stats`. Under jit the statistics are those of the global
  batch, so this is SyncBN. It differs from flax.linen.BatchNorm in two points, both as in PyTorch: the running
  variance is unbiased (the biased variance normalizes the batch), and the variance comes from a second pass over
  x - mean, since E[x^2] - E[x]^2 cancels catastrophically for a large mean.
  """

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    channels, count = x.shape[-1], int(np.prod(x.shape[:-1]))
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
    y = x.astype(jnp.float32)
    if train:
      if count < 2:
        raise ValueError(
          f"batch statistics need more than one value per channel (map {x.shape}): train with 2 images or more"
        )
      mean = y.mean((0, 1, 2))
      var = jnp.square(y - mean).mean((0, 1, 2))
      if not self.is_initializing():
        unbiased = var * (count / (count - 1))
        running_mean.value = BN_DECAY * running_mean.value + (1 - BN_DECAY) * mean
        running_var.value = BN_DECAY * running_var.value + (1 - BN_DECAY) * unbiased
    else:
      mean, var = running_mean.value, running_var.value
    y = (y - mean) * (jax.lax.rsqrt(var + BN_EPS) * scale) + bias
    return y.astype(x.dtype)


class ConvModule(nn.Module):
  """Convolution without bias (`conv`), BatchNorm (`bn`) and ReLU: [B, H, W, C] -> [B, H, W, O].

  The initial kernel is drawn from N(0, 2 / (k * k * O)), which is mmcv's kaiming_init (fan out).
  """

  features: int
  kernel_size: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    conv = Conv(self.features, self.kernel_size, init, self.dtype, use_bias=False, name="conv")
    return constrain_batch(nn.relu(BatchNorm(name="bn")(conv(x), train=train)))


class TransposedConv(nn.Module):
  """ConvTranspose2d with kernel 2 and stride 2: [B, H, W, C] -> [B, 2H, 2W, O].

  The windows do not overlap, so the operation is one matrix product to 4 * O values per pixel and a rearrangement. On
  CPU the gradient of the general operation takes 20 to 30 times longer. The parameters are `kernel` [2, 2, C, O]
  (PyTorch's [C, O, 2, 2], transposed) and `bias` [O]. Both have PyTorch's default initial values, for which the fan in
  of this layer is 4 * O.
  """

  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    init = uniform_init(4 * self.features)
    kernel = self.param("kernel", init, (2, 2, channels, self.features))
    bias = self.param("bias", init, (self.features,))
    x = product(x.astype(self.dtype), kernel.transpose(2, 0, 1, 3).reshape(channels, -1))
    x = x.reshape(batch, height, width, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
    return add_bias(x.reshape(batch, 2 * height, 2 * width, self.features), bias)


def classify(x: jax.Array, num_classes: int, dtype: jnp.dtype) -> jax.Array:
  """Final 1x1 convolution of a head, `conv_seg`; call it in a compact method.

  The initial kernel has a standard deviation of 0.01 (mmseg BaseDecodeHead).

  Args:
    x: [B, H, W, C].
    num_classes: Number of output channels.
    dtype: Data type of the computation.

  Returns:
    Logits float32 [B, H, W, num_classes].
  """
  init = nn.initializers.normal(0.01)
  conv = Conv(num_classes, 1, init, dtype, name="conv_seg")
  return constrain_batch(conv(x).astype(jnp.float32))


def drop_channels(x: jax.Array, *, train: bool) -> jax.Array:
  """Dropout2d(0.1), which zeroes whole channels of an image; call it in a compact method. Uses the "dropout" rng."""
  return nn.Dropout(DROPOUT, broadcast_dims=(1, 2), deterministic=not train, name="dropout")(x)
