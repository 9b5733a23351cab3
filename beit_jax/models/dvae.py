"""The discrete VAE of DALL-E: image -> visual tokens -> image.

Has the architecture of openai/DALL-E `dall_e/encoder.py` and `decoder.py` with configurable sizes. Parameter names are
those of the published files with `/` for `.`, `kernel` for `w` and `bias` for `b`. One deliberate difference: the first
and the last convolution compute in float32 and all others in `dtype` (OpenAI: float16 on CUDA). Products in float32
have that precision on every platform, so that an image has the same tokens everywhere. The sums of residual
blocks are in `residual_dtype`: their branches are small, since `post_gain` is 1/64 in the published model.
Shapes: B = batch size, H, W = image size in pixels, h, w = token grid (H / stride), N = h * w, V = vocabulary size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.models.layers import Conv
from beit_jax.models.resampling import max_pool_2x2

EPS = 0.1  # distance of mapped pixels from 0 and 1, where the logit is infinite


def map_pixels(image: jax.Array) -> jax.Array:
  """Maps pixels from [0, 1] to [0.1, 0.9], the range of the tokenizer's input."""
  return (1 - 2 * EPS) * image + EPS


def unmap_pixels(x: jax.Array) -> jax.Array:
  """Inverts `map_pixels` and clips to [0, 1]."""
  return jnp.clip((x - EPS) / (1 - 2 * EPS), 0, 1)


def _conv(features: int, size: int, dtype: Any, name: str) -> Conv:
  # Standard deviation 1/sqrt(fan_in), biases zero (dall_e/utils.py Conv2d).
  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / np.sqrt(np.prod(shape[:-1]))

  dtype = jnp.dtype(dtype)
  # Without it, JAX computes float32 products in bfloat16 on a TPU and in TF32 on a GPU, and tokens differ.
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
  return Conv(features, size, init, dtype, precision=precision, name=name)


class _Residual(nn.Module):
  """Four ReLU-convolutions with kernels of `sizes`: (3, 3, 3, 1) in the encoder, (1, 3, 3, 3) in the decoder."""

  features: int
  sizes: tuple[int, ...]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = self.features // 4
    for i, size in enumerate(self.sizes, 1):
      x = _conv(self.features if i == 4 else hidden, size, self.dtype, f"conv_{i}")(nn.relu(x))
    return x


class _ResidualBlock(nn.Module):
  """identity + post_gain * residual, in the dtype of the input."""

  features: int
  sizes: tuple[int, ...]
  post_gain: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    residual = _Residual(self.features, self.sizes, self.dtype, name="res_path")(x)
    dtype = x.dtype
    if x.shape[-1] != self.features:
      x = _conv(self.features, 1, self.dtype, "id_path")(x).astype(dtype)
    return x + self.post_gain * residual.astype(dtype)


class _Group(nn.Module):
  """`count` residual blocks of one width at one resolution."""

  features: int
  count: int
  sizes: tuple[int, ...]
  post_gain: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(1, self.count + 1):
      x = _ResidualBlock(self.features, self.sizes, self.post_gain, self.dtype, name=f"block_{i}")(x)
    return x


class DvaeEncoder(nn.Module):
  """Pixels mapped to [0.1, 0.9], [B, H, W, 3] -> logits float32 [B, h, w, V]."""

  n_hid: int = 256
  n_blk_per_group: int = 2
  group_count: int = 4
  vocab_size: int = 8192
  dtype: str = "float32"
  residual_dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dtype = jnp.dtype(self.dtype)
    post_gain = 1 / (self.group_count * self.n_blk_per_group) ** 2
    x = _conv(self.n_hid, 7, jnp.float32, "input")(x).astype(self.residual_dtype)
    for i in range(self.group_count):
      width = self.n_hid * 2**i
      x = _Group(width, self.n_blk_per_group, (3, 3, 3, 1), post_gain, dtype, name=f"group_{i + 1}")(x)
      if i < self.group_count - 1:
        x = max_pool_2x2(x)
    return _conv(self.vocab_size, 1, jnp.float32, "output")(nn.relu(x).astype(jnp.float32))


class DvaeDecoder(nn.Module):
  """One-hot or soft tokens [B, h, w, V] -> mean and log-scale before the sigmoid, float32 [B, H, W, 2C]."""

  n_init: int = 128
  n_hid: int = 256
  n_blk_per_group: int = 2
  group_count: int = 4
  in_channels: int = 3
  dtype: str = "float32"
  residual_dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dtype = jnp.dtype(self.dtype)
    post_gain = 1 / (self.group_count * self.n_blk_per_group) ** 2
    x = _conv(self.n_init, 1, jnp.float32, "input")(x).astype(self.residual_dtype)
    for i in range(self.group_count):
      width = self.n_hid * 2 ** (self.group_count - 1 - i)
      x = _Group(width, self.n_blk_per_group, (1, 3, 3, 3), post_gain, dtype, name=f"group_{i + 1}")(x)
      if i < self.group_count - 1:
        x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest neighbor
    return _conv(2 * self.in_channels, 1, jnp.float32, "output")(nn.relu(x).astype(jnp.float32))


class Dvae(nn.Module):
  """Encoder and decoder.

  The fields have OpenAI's names and, as defaults, the values of the published model. Its stride is 8: 112x112 pixels
  give 14x14 tokens.
  """

  n_hid: int = 256
  n_init: int = 128
  n_blk_per_group: int = 2
  group_count: int = 4  # stride 2 ** (group_count - 1)
  vocab_size: int = 8192
  in_channels: int = 3  # of the images
  dtype: str = "float32"
  residual_dtype: str = "float32"

  @property
  def stride(self) -> int:
    """Pixels per token, in each direction."""
    return 2 ** (self.group_count - 1)

  def with_dtype(self, dtype: str) -> "Dvae":
    """The same tokenizer with products in another dtype."""
    return self.clone(dtype=dtype)

  def setup(self) -> None:
    shared: dict[str, Any] = dict(
      n_blk_per_group=self.n_blk_per_group,
      group_count=self.group_count,
      dtype=self.dtype,
      residual_dtype=self.residual_dtype,
    )
    self.encoder = DvaeEncoder(n_hid=self.n_hid, vocab_size=self.vocab_size, **shared)
    self.decoder = DvaeDecoder(n_hid=self.n_hid, n_init=self.n_init, in_channels=self.in_channels, **shared)

  def logits(self, x: jax.Array) -> jax.Array:
    """Pixels mapped by `map_pixels`, float32 [B, H, W, 3] -> logits [B, h, w, V]."""
    return self.encoder(x)

  def tokenize(self, token_image: jax.Array) -> jax.Array:
    """Pixels in [0, 1], [B, H, W, 3] -> visual tokens int32 [B, N] in row-major order."""
    logits = self.logits(map_pixels(token_image))
    return logits.argmax(-1).astype(jnp.int32).reshape(len(logits), -1)

  def decode_soft(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token probabilities [B, h, w, V] -> (mean, log_scale) before the sigmoid, [B, H, W, 3] each."""
    mean, log_scale = jnp.split(self.decoder(tokens), 2, axis=-1)
    return mean, log_scale

  def decode(self, ids: jax.Array, grid_size: tuple[int, int]) -> jax.Array:
    """Visual tokens int32 [B, N] -> image float32 [B, H, W, 3] in [0, 1]."""
    one_hot = jax.nn.one_hot(ids.reshape(-1, *grid_size), self.vocab_size)
    return unmap_pixels(jax.nn.sigmoid(self.decode_soft(one_hot)[0]))

  def __call__(
    self,
    x: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    straight_through: bool = False,
    key: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """Encodes and decodes with relaxed tokens, as in training (DALL-E paper, section 2.1).

    Args:
      x: Pixels mapped by `map_pixels`, [B, H, W, 3].
      temperature: Temperature of the Gumbel-softmax relaxation; positive.
      straight_through: Use one-hot tokens in the forward pass and the gradient of the soft ones in the backward pass.
      key: Key of the Gumbel noise. None: no noise; the soft tokens are softmax(logits / temperature).

    Returns:
      `logits` [B, h, w, V], `mean` and `log_scale` [B, H, W, 3].
    """
    logits = self.logits(x)
    noisy = logits if key is None else logits + jax.random.gumbel(key, logits.shape)
    tokens = jax.nn.softmax(noisy / temperature)
    if straight_through:
      hard = jax.nn.one_hot(noisy.argmax(-1), self.vocab_size)
      tokens = hard + tokens - jax.lax.stop_gradient(tokens)
    mean, log_scale = self.decode_soft(tokens)
    return {"logits": logits, "mean": mean, "log_scale": log_scale}
