"""Layers of the BEiT encoder. Follows unilm `beit/modeling_finetune.py`.

Parameter names are the public interface of checkpoints.
Shapes: B = batch size, H, W = image size in pixels, P = patch size, h, w = grid size in patches, N = h * w patches,
T = 1 + N tokens (cls token first), D = width, K = heads.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.models.attention import attention, attention_weights
from beit_jax.models.constrain import constrain_batch

Initializer = Callable[..., jax.Array]

# Pre-training truncates the normal distribution at one sigma without rescaling (actual std 0.0108). Fine-tuning
# truncates at an absolute value of 2, which has no effect. (unilm modeling_pretrain.py and timm)
INITS: dict[str, Initializer] = {
  "pretrain": nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0),
  "finetune": nn.initializers.normal(0.02),
}


def uniform_init(fan_in: int) -> Initializer:
  """PyTorch's default for kernels and biases of convolutions: uniform in +-1/sqrt(fan_in)."""
  bound = 1 / np.sqrt(fan_in)

  def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

  return init


def scaled_init(init: Initializer, scale: float) -> Initializer:
  """Initializer that multiplies the values of `init` by `scale`."""

  def scaled(key: jax.Array, *args: object) -> jax.Array:
    return init(key, *args) * scale

  return scaled


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x @ kernel in the dtype of `x`, with a gradient of the kernel that is summed in float32.

  The gradient of a kernel that is cast to bfloat16 is bfloat16, on each device and in the sum over devices.

  Args:
    x: [..., D].
    kernel: float32 [D, F].

  Returns:
    [..., F].
  """
  return x @ kernel.astype(x.dtype)


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  rows = (*range(x.ndim - 1),)
  kernel_grad = jax.lax.dot_general(x, grad, ((rows, rows), ((), ())), preferred_element_type=kernel.dtype)
  return grad @ kernel.astype(grad.dtype).T, kernel_grad


product.defvjp(_product_forward, _product_backward)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """x + bias in the dtype of `x`, with a gradient of the bias that is summed in float32."""
  return (x.astype(bias.dtype) + bias).astype(x.dtype)


class Dense(nn.Module):
  """x @ kernel + bias in `dtype`, with gradients of the parameters in float32: [..., D] -> [..., features]."""

  features: int
  kernel_init: Initializer
  dtype: jnp.dtype
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    x = product(x.astype(self.dtype), kernel)
    return add_bias(x, self.param("bias", nn.initializers.zeros, (self.features,))) if self.use_bias else x


def _convolve(x: jax.Array, kernel: jax.Array, precision: jax.lax.Precision | None) -> jax.Array:
  layout = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(
    x, kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=layout, precision=precision
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution(x: jax.Array, kernel: jax.Array, precision: jax.lax.Precision | None) -> jax.Array:
  """Convolution with stride 1 and zero padding in the dtype of `x`; the kernel's gradient is summed in float32.

  Args:
    x: [B, H, W, C].
    kernel: float32 [k, k, C, O].
    precision: Of the products; None: JAX's default.

  Returns:
    [B, H, W, O].
  """
  return _convolve(x, kernel, precision)


def _convolution_forward(
  x: jax.Array, kernel: jax.Array, precision: jax.lax.Precision | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _convolve(x, kernel, precision), (x, kernel)


def _convolution_backward(
  precision: jax.lax.Precision | None, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  wide, wide_grad = x.astype(kernel.dtype), grad.astype(kernel.dtype)
  (x_grad,) = jax.linear_transpose(lambda x: _convolve(x, kernel, precision), x)(grad)
  (kernel_grad,) = jax.linear_transpose(lambda k: _convolve(wide, k, precision), kernel)(wide_grad)
  return x_grad, kernel_grad


convolution.defvjp(_convolution_forward, _convolution_backward)


class Conv(nn.Module):
  """Convolution with stride 1 and zero padding in `dtype`: [B, H, W, C] -> [B, H, W, features].

  The parameters' gradients are float32.
  """

  features: int
  size: int
  kernel_init: Initializer
  dtype: jnp.dtype
  use_bias: bool = True
  precision: jax.lax.Precision | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.features))
    x = convolution(x.astype(self.dtype), kernel, self.precision)
    return add_bias(x, self.param("bias", nn.initializers.zeros, (self.features,))) if self.use_bias else x


def patches_of(image: jax.Array, size: int) -> jax.Array:
  """Cuts images into patches of P x P pixels, in row-major order: [B, H, W, C] -> [B, N, P * P * C]."""
  batch, height, width, channels = image.shape
  x = image.reshape(batch, height // size, size, width // size, size, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


def image_from_patches(patches: jax.Array, shape: tuple[int, ...], size: int) -> jax.Array:
  """The inverse of `patches_of`; `shape` is that of the images, (B, H, W, C)."""
  batch, height, width, channels = shape
  x = patches.reshape(batch, height // size, width // size, size, size, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(shape)


class PatchEmbed(nn.Module):
  """Non-overlapping P x P convolution as one matrix product: [B, H, W, C] -> [B, N, D]."""

  width: int
  patch_size: int
  weight_init: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    p, channels = self.patch_size, image.shape[-1]
    if self.weight_init == "finetune":
      kernel_init = bias_init = uniform_init(p * p * channels)
    else:
      kernel_init, bias_init = INITS[self.weight_init], nn.initializers.zeros
    kernel = self.param("kernel", kernel_init, (p, p, channels, self.width))
    bias = self.param("bias", bias_init, (self.width,))
    x = patches_of(image.astype(self.dtype), p)
    return add_bias(product(x, kernel.reshape(-1, self.width)), bias)


@functools.lru_cache(maxsize=4)  # every block calls it
def relative_position_index(grid_size: tuple[int, int]) -> np.ndarray:
  """Row of the bias table for every pair of tokens, as unilm's RelativePositionBias.

  For patches i and j with (dy, dx) = position(i) - position(j) the row is (dy + h - 1) * (2w - 1) + dx + w - 1. The
  last three rows of the table belong to cls -> patch, patch -> cls and cls -> cls.

  Returns:
    int32 [T, T], cls token first, read-only.
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
  """Adds a zero-initialized bias table to `module` and returns the attention bias, float32 [1, K, T, T]."""
  height, width = grid_size
  rows = (2 * height - 1) * (2 * width - 1) + 3
  table = module.param("relative_position_bias_table", nn.initializers.zeros, (rows, num_heads))
  index = relative_position_index(grid_size)
  return table[index.ravel()].reshape(*index.shape, num_heads).transpose(2, 0, 1)[None]


class RelPosBias(nn.Module):
  """Bias table that all blocks share in pre-training: () -> float32 [1, K, T, T]."""

  grid_size: tuple[int, int]
  num_heads: int

  @nn.compact
  def __call__(self) -> jax.Array:
    return relative_position_bias(self, self.grid_size, self.num_heads)


class Attention(nn.Module):
  """Multi-head self-attention with one fused qkv kernel and biases on q and v only: [B, T, D] -> [B, T, D].

  The argument `bias` is float32 [1, K, T, T] or None. If `grid_size` is set, the module has a bias table of its own.
  Where the collection "intermediates" is mutable, it receives the softmax weights as "attention", [B, K, T, T].
  """

  width: int
  num_heads: int
  weight_init: Initializer
  proj_init: Initializer
  dtype: jnp.dtype
  grid_size: tuple[int, int] | None = None
  attention: str = "auto"  # see `attention.choose_implementation`

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    batch, tokens, width = x.shape
    qkv = Dense(3 * width, self.weight_init, self.dtype, use_bias=False, name="qkv")(x)
    q_bias = self.param("q_bias", nn.initializers.zeros, (width,))
    v_bias = self.param("v_bias", nn.initializers.zeros, (width,))
    # A bias on k would add the same number to all logits of a query, which the softmax cancels.
    qkv = add_bias(qkv, jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]))
    # The gradient of a split is one concatenation; that of indexing would be a sum of three zero-padded arrays.
    # Each: [B, T, K, D/K].
    q, k, v = (x.reshape(batch, tokens, self.num_heads, -1) for x in jnp.split(qkv, 3, axis=-1))
    if self.grid_size is not None:
      bias = relative_position_bias(self, self.grid_size, self.num_heads)
    if self.is_mutable_collection("intermediates"):  # otherwise, as in training, the weights are not traced
      self.sow("intermediates", "attention", attention_weights(q, k, bias, self.attention))
    x = attention(q, k, v, bias, self.attention).reshape(batch, tokens, width)
    return Dense(width, self.proj_init, self.dtype, name="proj")(x)


# "gelu" is exact (erf). CLIP was trained with "quick_gelu", SigLIP and some others with "gelu_tanh".
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


class Mlp(nn.Module):
  """fc1, a key of `ACTIVATIONS` and fc2, without dropout between them: [B, T, D] -> [B, T, D]."""

  hidden: int
  weight_init: Initializer
  fc2_init: Initializer
  dtype: jnp.dtype
  activation: str = "gelu"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    x = Dense(self.hidden, self.weight_init, self.dtype, name="fc1")(x)
    x = ACTIVATIONS[self.activation](x)
    return Dense(width, self.fc2_init, self.dtype, name="fc2")(x)


def drop_path(x: jax.Array, rate: jax.Array | float, key: jax.Array | None) -> jax.Array:
  """Stochastic depth: zeroes a residual branch per example with probability `rate` and rescales the others.

  Args:
    x: [B, T, D].
    rate: Drop probability.
    key: Random key; None returns `x`.
  """
  if key is None:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0], 1, 1))
  return x * (keep / (1.0 - rate)).astype(x.dtype)


class Block(nn.Module):
  """Pre-norm transformer block: x + gamma_1 * attn(norm1(x)), then x + gamma_2 * mlp(norm2(x)).

  Norms and products give `dtype`. The sums, and so the input and the output, keep the dtype of `x`: in bfloat16 a
  branch that LayerScale has made small would vanish in the sum.
  `layer` counts from 1. The initial values of the two output kernels are divided by sqrt(2 * layer) (BEiT paper,
  section 2.5; unilm `fix_init_weight`).
  """

  width: int
  num_heads: int
  mlp_ratio: float
  layer: int
  weight_init: str
  layer_scale_init: float
  norm_eps: float
  dtype: jnp.dtype
  grid_size: tuple[int, int] | None = None  # set: the block has a bias table of its own
  attention: str = "auto"
  activation: str = "gelu"

  @nn.compact
  def __call__(
    self, x: jax.Array, bias: jax.Array | None, drop_rate: jax.Array | float, drop_key: jax.Array | None
  ) -> jax.Array:
    """Applies the block.

    Args:
      x: [B, T, D], the residual stream.
      bias: [1, K, T, T] or None.
      drop_rate: Probability of stochastic depth.
      drop_key: Key of stochastic depth; None in evaluation.

    Returns:
      [B, T, D], in the dtype of `x`.
    """
    init = INITS[self.weight_init]
    output_init = scaled_init(init, 1 / np.sqrt(2.0 * self.layer))
    attn = Attention(
      width=self.width,
      num_heads=self.num_heads,
      weight_init=init,
      proj_init=output_init,
      dtype=self.dtype,
      grid_size=self.grid_size,
      attention=self.attention,
      name="attn",
    )
    mlp = Mlp(int(self.width * self.mlp_ratio), init, output_init, self.dtype, self.activation, name="mlp")
    norm1 = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm1")
    norm2 = nn.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm2")
    keys = (None, None) if drop_key is None else jax.random.split(drop_key)

    def branch(y: jax.Array, name: str, key: jax.Array | None) -> jax.Array:
      y = y.astype(x.dtype)
      if self.layer_scale_init:
        gamma = self.param(name, nn.initializers.constant(self.layer_scale_init), (self.width,))
        y = y * gamma.astype(y.dtype)
      return drop_path(y, drop_rate, key)

    x = x + branch(attn(norm1(x), bias), "gamma_1", keys[0])
    x = x + branch(mlp(norm2(x)), "gamma_2", keys[1])
    return constrain_batch(x)
