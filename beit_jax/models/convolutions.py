"""Parts that the segmentation heads share. Letters: B batch, H W map, C channels in, O channels out.

Follows mmcv ConvModule and PyTorch's SyncBatchNorm and ConvTranspose2d.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.models.constrain import constrain_batch

BN_EPS = 1e-5
BN_DECAY = 0.9  # PyTorch's momentum 0.1
DROPOUT = 0.1


class BatchNorm(nn.Module):
  """Batch normalisation over (B, H, W), [B, H, W, C] -> [B, H, W, C]; running `mean` and `var` in `batch_stats`.

  Under jit the mean over a batch that is spread over a mesh is the global one, so this is SyncBN. It computes in
  float32. Two differences from flax.linen.BatchNorm, both as PyTorch does it: the running variance is the unbiased
  one (the batch is normalised with the biased one), and the variance is a second pass over x - mean, since
  E[x^2] - E[x]^2 loses all digits where the mean is large.
  """

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    channels, count = x.shape[-1], int(np.prod(x.shape[:-1]))
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
    y = x.astype(jnp.float32)
    if train:
      if count < 2:
        raise ValueError(
          f"batch statistics of one value per channel (map {x.shape}): train with 2 images or more"
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
  """Convolution without bias (`conv`), BatchNorm (`bn`), ReLU; the size stays. [B, H, W, C] -> [B, H, W, O].

  The kernel starts from N(0, 2 / (k * k * O)), mmcv's kaiming_init (fan out).
  """

  features: int
  kernel_size: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    conv = nn.Conv(
      self.features,
      (self.kernel_size,) * 2,
      use_bias=False,
      kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
      dtype=self.dtype,
      name="conv",
    )
    return constrain_batch(nn.relu(BatchNorm(name="bn")(conv(x), train=train)))


class TransposedConv(nn.Module):
  """ConvTranspose2d(kernel 2, stride 2): [B, H, W, C] -> [B, 2H, 2W, O].

  The windows do not overlap, so it is one matrix product to 4 * O numbers a pixel and a rearrangement; XLA on
  the CPU needs 20 to 30 times longer for the gradient of the general operation. Parameters: `kernel`
  [2, 2, C, O] (PyTorch's [C, O, 2, 2] transposed by 2, 3, 0, 1) and `bias` [O]; both start from PyTorch's
  default, whose fan in is 4 * O for this layer.
  """

  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    batch, height, width, channels = x.shape
    bound = 1 / np.sqrt(4 * self.features)
    init = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    kernel = self.param("kernel", init, (2, 2, channels, self.features)).astype(self.dtype)
    bias = self.param("bias", init, (self.features,)).astype(self.dtype)
    x = x.astype(self.dtype) @ kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    x = x.reshape(batch, height, width, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, self.features) + bias


def classify(x: jax.Array, num_classes: int, dtype: jnp.dtype) -> jax.Array:
  """The last 1x1 convolution of a head, `conv_seg`: [B, H, W, C] -> logits float32 [B, H, W, num_classes].

  To be called in a compact method. The kernel starts from N(0, 0.01) (mmseg BaseDecodeHead).
  """
  init = nn.initializers.normal(0.01)
  conv = nn.Conv(num_classes, (1, 1), kernel_init=init, dtype=dtype, name="conv_seg")
  return conv(x).astype(jnp.float32)


def drop_channels(x: jax.Array, *, train: bool) -> jax.Array:
  """Dropout2d(0.1): whole channels of an image, from the "dropout" rng. To be called in a compact method."""
  return nn.Dropout(DROPOUT, broadcast_dims=(1, 2), deterministic=not train, name="dropout")(x)
