"""Softmax attention with a bias, computed by XLA or by cuDNN's fused kernel.

Shapes: B = batch size, T = tokens, K = heads, H = size of a head.
"""

import re
from typing import Literal

import jax
import jax.numpy as jnp

from beit_jax.models.constrain import constrain_batch, constrain_replicated

Implementation = Literal["xla", "cudnn"]

LENGTH_MULTIPLE = 8  # JAX trains with cuDNN at even lengths only; the kernel's tiles fit multiples of 8


def cudnn_obstacle(dtype: str, head_dim: int, platform: str, capability: str) -> str:
  """Reason why cuDNN's kernel cannot run, or "" if it can.

  Args:
    dtype: Data type of the computation.
    head_dim: Size of a head.
    platform: Platform of the device as JAX names it, such as "gpu".
    capability: Compute capability as JAX reports it, such as "8.0". Only CUDA devices have this form.
  """
  if platform != "gpu" or not re.fullmatch(r"\d+\.\d+", capability):
    return f"it needs a CUDA GPU, this is {platform} {capability}".rstrip()
  generation = tuple(map(int, capability.split(".")))
  largest = 256 if generation >= (9, 0) else 128
  if generation < (8, 0):
    return f"it needs compute capability 8.0 or higher, this device has {capability}"
  if dtype not in ("bfloat16", "float16"):
    return f"it computes in bfloat16 and float16, not in {dtype}"
  if head_dim % 8 or head_dim > largest:
    return f"it needs a head size that is a multiple of 8 and at most {largest}, got {head_dim}"
  return ""


def choose_implementation(requested: str, dtype: str, head_dim: int) -> tuple[Implementation, str]:
  """Implementation to use on this process's first device, and the reason for the choice.

  Args:
    requested: "auto", "xla" or "cudnn". If cuDNN cannot run, the choice is "xla".
    dtype: Data type of the computation.
    head_dim: Size of a head.
  """
  if requested == "xla":
    return "xla", "as requested"
  device = jax.local_devices()[0]
  capability = getattr(device, "compute_capability", "")  # only GPUs have this attribute
  obstacle = cudnn_obstacle(dtype, head_dim, device.platform, str(capability))
  return ("xla", f"cuDNN: {obstacle}") if obstacle else ("cudnn", f"{dtype} on {device.device_kind}")


def padded_length(tokens: int) -> int:
  """Number of tokens to which the input of cuDNN's kernel is padded."""
  length = -(-tokens // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
  # At 64 above a multiple of 128 the backward kernel on Hopper does not mask the end of the last tile. The result is
  # NaN where all logits of a query are below -88 (pytorch#196678, cudnn-frontend#628; seen with cuDNN 9.20).
  return length + LENGTH_MULTIPLE * (length % 128 == 64)


def padded_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None,
  implementation: Implementation,
) -> jax.Array:
  """`jax.nn.dot_product_attention` at `padded_length` tokens, with the same outputs and gradients.

  Padding keys get a bias so low that their softmax weight is 0. The outputs of padding queries are removed.

  Args:
    query: [B, T, K, H].
    key: [B, T, K, H].
    value: [B, T, K, H].
    bias: [1, K, T, T] or None.
    implementation: Passed on to JAX.

  Returns:
    [B, T, K, H].
  """
  tokens, heads = query.shape[1:3]
  padding = padded_length(tokens) - tokens
  if padding:
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value))
    if bias is None:
      # JAX always asks cuDNN for the gradient of the bias. cuDNN has supported it longest for a bias with all heads.
      bias = jnp.zeros((1, heads, tokens, tokens), query.dtype)
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, padding), (0, padding)))
    # JAX's own values for masked keys. With larger ones cuDNN subtracts one from another and returns NaN.
    lowest = -(2.0**15) if bias.dtype == jnp.float16 else -(2.0**41)
    bias = jnp.where(jnp.arange(tokens + padding) < tokens, bias, jnp.asarray(lowest, bias.dtype))
  # The kernel can only be partitioned along batch and heads, and needs one sharding for all three inputs. Under FSDP
  # XLA would shard each input like its own weights.
  query, key, value = map(constrain_batch, (query, key, value))
  bias = None if bias is None else constrain_replicated(bias)
  out = jax.nn.dot_product_attention(query, key, value, bias=bias, implementation=implementation)
  return constrain_batch(out)[:, :tokens]


def attention(
  query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, requested: str
) -> jax.Array:
  """Computes softmax(query key^T / sqrt(H) + bias) value.

  Args:
    query: [B, T, K, H].
    key: [B, T, K, H].
    value: [B, T, K, H].
    bias: float32 [1, K, T, T] or None.
    requested: "auto", "xla" or "cudnn"; see `choose_implementation`.

  Returns:
    [B, T, K, H].
  """
  if choose_implementation(requested, query.dtype.name, query.shape[-1])[0] == "cudnn":
    # The kernel takes all inputs in one dtype. XLA adds the bias to the logits in float32.
    bias = None if bias is None else bias.astype(query.dtype)
    return padded_attention(query, key, value, bias, "cudnn")
  return jax.nn.dot_product_attention(query, key, value, bias=bias)


def attention_weights(query: jax.Array, key: jax.Array, bias: jax.Array | None, requested: str) -> jax.Array:
  """The softmax weights of `attention`: its outputs where the values are the columns of an identity matrix.

  There is no second formula that could differ from the first. The values of one call have as many columns as a head.

  Args:
    query: [B, T, K, H].
    key: [B, T, K, H].
    bias: float32 [1, K, T, T] or None.
    requested: See `attention`.

  Returns:
    float32 [B, K, T, T]; the weights of a query, the third axis, sum to 1.
  """
  tokens, size = query.shape[1], query.shape[-1]
  columns = jnp.eye(tokens, tokens + -tokens % size, dtype=query.dtype)[None, :, None]  # [1, T, 1, C]
  parts = [
    attention(query, key, jnp.broadcast_to(columns[..., i : i + size], key.shape), bias, requested)
    for i in range(0, tokens, size)
  ]
  return jnp.concatenate(parts, -1)[..., :tokens].swapaxes(1, 2).astype(jnp.float32)
