"""The discrete VAE of DALL-E: image -> visual tokens -> image.

Architecture of openai/DALL-E `dall_e/encoder.py`, `decoder.py` with configurable sizes; parameter names are
those of the published files with `.` as `/` and `w`, `b` as `kernel`, `bias`. Differs on purpose: one compute
dtype for all convolutions but the first and the last, which are float32 (there: float16 on CUDA).
Letters: B batch, H W pixels, h w token grid (H / stride), V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.models.resampling import max_pool_2x2

EPS = 0.1  # map_pixels keeps pixels EPS away from 0 and 1, where the logit is infinite


def map_pixels(image: jax.Array) -> jax.Array:
  """[0, 1] -> [0.1, 0.9]: what the tokenizer sees."""
  return (1 - 2 * EPS) * image + EPS


def unmap_pixels(x: jax.Array) -> jax.Array:
  """The inverse of `map_pixels`, clipped to [0, 1]."""
  return jnp.clip((x - EPS) / (1 - 2 * EPS), 0, 1)


def _conv(features: int, size: int, dtype, name: str) -> nn.Conv:
  def init(key, shape, dtype=jnp.float32):  # N(0, 1/sqrt(fan_in)), biases zero (dall_e/utils.py Conv2d)
    return jax.random.normal(key, shape, dtype) / np.sqrt(np.prod(shape[:-1]))

  return nn.Conv(features, (size, size), padding="SAME", kernel_init=init, dtype=dtype, name=name)


class _Residual(nn.Module):
  """Four ReLU-convolutions; `sizes` are the kernels: 3331 in the encoder, 1333 in the decoder."""

  features: int
  sizes: tuple[int, ...]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    hidden = self.features // 4
    for i, size in enumerate(self.sizes, 1):
      x = _conv(self.features if i == 4 else hidden, size, self.dtype, f"conv_{i}")(nn.relu(x))
    return x


class _Block(nn.Module):
  """identity + post_gain * residual."""

  features: int
  sizes: tuple[int, ...]
  post_gain: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    residual = _Residual(self.features, self.sizes, self.dtype, name="res_path")(x)
    if x.shape[-1] != self.features:
      x = _conv(self.features, 1, self.dtype, "id_path")(x)
    return x + self.post_gain * residual


class _Group(nn.Module):
  """`count` blocks of one width at one resolution."""

  features: int
  count: int
  sizes: tuple[int, ...]
  post_gain: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    for i in range(1, self.count + 1):
      x = _Block(self.features, self.sizes, self.post_gain, self.dtype, name=f"block_{i}")(x)
    return x


class DvaeEncoder(nn.Module):
  """Pixels in [0.1, 0.9] (`map_pixels`), [B, H, W, 3] -> logits float32 [B, h, w, V]."""

  n_hid: int = 256
  n_blk_per_group: int = 2
  group_count: int = 4
  vocab_size: int = 8192
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    dtype = jnp.dtype(self.dtype)
    post_gain = 1 / (self.group_count * self.n_blk_per_group) ** 2
    x = _conv(self.n_hid, 7, jnp.float32, "input")(x).astype(dtype)
    for i in range(self.group_count):
      width = self.n_hid * 2**i
      x = _Group(width, self.n_blk_per_group, (3, 3, 3, 1), post_gain, dtype, name=f"group_{i + 1}")(x)
      if i < self.group_count - 1:
        x = max_pool_2x2(x)
    return _conv(self.vocab_size, 1, jnp.float32, "output")(nn.relu(x).astype(jnp.float32))


class DvaeDecoder(nn.Module):
  """One-hot or soft tokens [B, h, w, V] -> float32 [B, H, W, 6]: mean and log-scale before the sigmoid."""

  n_init: int = 128
  n_hid: int = 256
  n_blk_per_group: int = 2
  group_count: int = 4
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    dtype = jnp.dtype(self.dtype)
    post_gain = 1 / (self.group_count * self.n_blk_per_group) ** 2
    x = _conv(self.n_init, 1, jnp.float32, "input")(x).astype(dtype)
    for i in range(self.group_count):
      width = self.n_hid * 2 ** (self.group_count - 1 - i)
      x = _Group(width, self.n_blk_per_group, (1, 3, 3, 3), post_gain, dtype, name=f"group_{i + 1}")(x)
      if i < self.group_count - 1:
        x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest neighbour
    return _conv(6, 1, jnp.float32, "output")(nn.relu(x).astype(jnp.float32))


class Dvae(nn.Module):
  """Encoder and decoder. `token_image` is uint8-like RGB scaled to [0, 1] unless said otherwise.

  Fields are OpenAI's names; the published model is the defaults: stride 8, so 112x112 pixels give 14x14.
  """

  n_hid: int = 256
  n_init: int = 128
  n_blk_per_group: int = 2
  group_count: int = 4  # stride 2 ** (group_count - 1)
  vocab_size: int = 8192
  dtype: str = "float32"

  @property
  def stride(self) -> int:
    return 2 ** (self.group_count - 1)

  def setup(self):
    shared = dict(n_blk_per_group=self.n_blk_per_group, group_count=self.group_count, dtype=self.dtype)
    self.encoder = DvaeEncoder(n_hid=self.n_hid, vocab_size=self.vocab_size, **shared)
    self.decoder = DvaeDecoder(n_hid=self.n_hid, n_init=self.n_init, **shared)

  def logits(self, x):
    """float32 [B, H, W, 3], already `map_pixels`'d -> logits [B, h, w, V]."""
    return self.encoder(x)

  def tokenize(self, token_image):
    """[B, H, W, 3] in [0, 1] -> visual tokens int32 [B, N], row-major."""
    logits = self.logits(map_pixels(token_image))
    return logits.argmax(-1).astype(jnp.int32).reshape(len(logits), -1)

  def decode_soft(self, tokens):
    """[B, h, w, V] rows that sum to 1 -> (mean, log_scale), each [B, H, W, 3], before the sigmoid."""
    return jnp.split(self.decoder(tokens), 2, axis=-1)

  def decode(self, ids, grid_size):
    """Visual tokens int32 [B, N] -> image float32 [B, H, W, 3] in [0, 1]."""
    one_hot = jax.nn.one_hot(ids.reshape(-1, *grid_size), self.vocab_size)
    return unmap_pixels(jax.nn.sigmoid(self.decode_soft(one_hot)[0]))

  def __call__(self, x, *, temperature=1.0, straight_through=False, key=None):
    """The training pass (DALL-E paper, section 2.1).

    Args:
      x: [B, H, W, 3], `map_pixels`'d.
      temperature: of the Gumbel-softmax relaxation; positive.
      straight_through: hard one-hot tokens forwards, the soft ones' gradient backwards.
      key: of the Gumbel noise; None: no noise, the soft tokens are softmax(logits / temperature).

    Returns:
      dict of logits [B, h, w, V] and mean, log_scale [B, H, W, 3].
    """
    logits = self.logits(x)
    noisy = logits if key is None else logits + jax.random.gumbel(key, logits.shape)
    tokens = jax.nn.softmax(noisy / temperature)
    if straight_through:
      hard = jax.nn.one_hot(noisy.argmax(-1), self.vocab_size)
      tokens = hard + tokens - jax.lax.stop_gradient(tokens)
    mean, log_scale = self.decode_soft(tokens)
    return {"logits": logits, "mean": mean, "log_scale": log_scale}
