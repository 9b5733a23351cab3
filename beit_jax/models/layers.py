"""Parts of the BEiT encoder. Follows unilm `beit/modeling_finetune.py`; names are the checkpoint's interface.

Letters: B batch, H W image in pixels, h w grid in patches, N = h*w patches, T = 1 + N tokens (cls first),
D width, K heads, P patch size.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.models.attention import attention
from beit_jax.models.constrain import constrain_batch

Initializer = Callable[..., jax.Array]

# Pre-training cuts the normal distribution at +-1 sigma and does not rescale (real std 0.0108);
# fine-tuning cuts at +-2.0 in absolute terms, that is not at all. (unilm modeling_pretrain.py / timm)
INITS: dict[str, Initializer] = {
  "pretrain": nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0),
  "finetune": nn.initializers.normal(0.02),
}


def pytorch_conv_init(key, shape, dtype=jnp.float32):
  """PyTorch's default for Conv2d: uniform in +-1/sqrt(fan_in), kernel [.., in, out] (fine-tune patch conv)."""
  bound = 1 / np.sqrt(np.prod(shape[:-1]))
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class PatchEmbed(nn.Module):
  """Non-overlapping P x P convolution, computed as one matrix product. [B, H, W, 3] -> [B, N, D]."""

  width: int
  patch_size: int
  weight_init: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, image):
    p = self.patch_size
    batch, height, width, channels = image.shape
    if self.weight_init == "finetune":
      kernel_init = pytorch_conv_init
      bound = 1 / np.sqrt(p * p * channels)
      bias_init = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)  # noqa: E731
    else:
      kernel_init, bias_init = INITS[self.weight_init], nn.initializers.zeros
    kernel = self.param("kernel", kernel_init, (p, p, channels, self.width))
    bias = self.param("bias", bias_init, (self.width,))
    x = image.astype(self.dtype).reshape(batch, height // p, p, width // p, p, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)  # [B, N, P*P*3]
    return x @ kernel.astype(self.dtype).reshape(-1, self.width) + bias.astype(self.dtype)


@functools.lru_cache(maxsize=4)  # every block asks
def relative_position_index(grid_size: tuple[int, int]) -> np.ndarray:
  """Row of the bias table for every pair of tokens: int32 [T, T], cls first.

  Patches i, j with (dy, dx) = coord(i) - coord(j): (dy + h - 1) * (2w - 1) + dx + w - 1. The last three
  rows of the table are cls -> patch, patch -> cls, cls -> cls. (unilm RelativePositionBias)
  """
  height, width = grid_size
  below, beside = (np.subtract.outer(np.arange(n), np.arange(n)) + n - 1 for n in grid_size)
  rows = (2 * height - 1) * (2 * width - 1) + 3
  index = np.empty((height * width + 1,) * 2, np.int32)
  between = below[:, None, :, None] * (2 * width - 1) + beside[:, None]  # [h, w, h, w]
  index[1:, 1:] = between.reshape(height * width, -1)
  index[0, :] = rows - 3
  index[:, 0] = rows - 2
  index[0, 0] = rows - 1
  index.setflags(write=False)
  return index


def relative_position_bias(module: nn.Module, grid_size: tuple[int, int], num_heads: int) -> jax.Array:
  """Makes `module` own a table, zero at first, and returns the bias of the logits: float32 [1, K, T, T]."""
  height, width = grid_size
  rows = (2 * height - 1) * (2 * width - 1) + 3
  table = module.param("relative_position_bias_table", nn.initializers.zeros, (rows, num_heads))
  index = relative_position_index(grid_size)
  return table[index.ravel()].reshape(*index.shape, num_heads).transpose(2, 0, 1)[None]


class RelPosBias(nn.Module):
  """The table that all blocks share in pre-training. () -> float32 [1, K, T, T]."""

  grid_size: tuple[int, int]
  num_heads: int

  @nn.compact
  def __call__(self):
    return relative_position_bias(self, self.grid_size, self.num_heads)


class Attention(nn.Module):
  """Multi-head self-attention; one fused qkv kernel, biases on q and v only. [B, T, D] -> [B, T, D].

  Args of the call: bias float32 [1, K, T, T] or None. With `grid_size` the block owns a table of its own.
  """

  width: int
  num_heads: int
  weight_init: Initializer
  proj_init: Initializer
  dtype: jnp.dtype
  grid_size: tuple[int, int] | None = None
  attention: str = "auto"  # see attention.py

  @nn.compact
  def __call__(self, x, bias=None):
    batch, tokens, width = x.shape
    qkv = nn.Dense(3 * width, use_bias=False, kernel_init=self.weight_init, dtype=self.dtype, name="qkv")(x)
    q_bias = self.param("q_bias", nn.initializers.zeros, (width,))
    v_bias = self.param("v_bias", nn.initializers.zeros, (width,))
    # A bias on k would add the same number to all logits of a query, which the softmax cancels.
    qkv += jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(qkv.dtype)
    # Split, not indexed: the gradient is then one concatenation, not three arrays of zeros that are added.
    q, k, v = (
      x.reshape(batch, tokens, self.num_heads, -1) for x in jnp.split(qkv, 3, axis=-1)
    )  # [B, T, K, D/K]
    if self.grid_size is not None:
      bias = relative_position_bias(self, self.grid_size, self.num_heads)
    x = attention(q, k, v, bias, self.attention).reshape(batch, tokens, width)
    return nn.Dense(width, kernel_init=self.proj_init, dtype=self.dtype, name="proj")(x)


class Mlp(nn.Module):
  """fc1, exact (erf) GELU, fc2; no dropout between. [B, T, D] -> [B, T, D]."""

  hidden: int
  weight_init: Initializer
  fc2_init: Initializer
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    x = nn.Dense(self.hidden, kernel_init=self.weight_init, dtype=self.dtype, name="fc1")(x)
    x = nn.gelu(x, approximate=False)
    return nn.Dense(width, kernel_init=self.fc2_init, dtype=self.dtype, name="fc2")(x)


def drop_path(x: jax.Array, rate: jax.Array | float, key: jax.Array | None) -> jax.Array:
  """Stochastic depth: zeroes a residual branch per sample with probability `rate`, rescales the others."""
  if key is None:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0], 1, 1))
  return x * (keep / (1.0 - rate)).astype(x.dtype)


class Block(nn.Module):
  """Pre-norm transformer block: x + gamma_1 * attn(norm1(x)), then x + gamma_2 * mlp(norm2(x)).

  `layer` counts from 1 and divides the init of the two output matrices by sqrt(2 * layer) (BEiT paper,
  section 2.5, "fix_init_weight").
  """

  width: int
  num_heads: int
  mlp_ratio: float
  layer: int
  weight_init: str
  layer_scale_init: float
  norm_eps: float
  dtype: jnp.dtype
  grid_size: tuple[int, int] | None = None  # of a bias table of its own
  attention: str = "auto"

  @nn.compact
  def __call__(self, x, bias, drop_rate, drop_key):
    """x [B, T, D]; bias [1, K, T, T] or None; drop_rate scalar; drop_key a key, or None when evaluating."""
    init = INITS[self.weight_init]
    scale = 1 / np.sqrt(2.0 * self.layer)
    output_init = lambda *args: init(*args) * scale  # noqa: E731
    attn = Attention(
      *(self.width, self.num_heads, init, output_init, self.dtype, self.grid_size, self.attention),
      name="attn",
    )
    mlp = Mlp(int(self.width * self.mlp_ratio), init, output_init, self.dtype, name="mlp")
    norm1 = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm1")
    norm2 = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm2")
    keys = (None, None) if drop_key is None else jax.random.split(drop_key)

    def branch(y, name, key):
      if self.layer_scale_init:
        gamma = self.param(name, nn.initializers.constant(self.layer_scale_init), (self.width,))
        y = y * gamma.astype(y.dtype)
      return drop_path(y, drop_rate, key)

    x = x + branch(attn(norm1(x), bias), "gamma_1", keys[0])
    x = x + branch(mlp(norm2(x)), "gamma_2", keys[1])
    return constrain_batch(x)
