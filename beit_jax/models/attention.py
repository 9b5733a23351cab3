"""Softmax attention with a bias, by XLA or by cuDNN's fused kernel: which one, and the padding that kernel wants.

Letters: B batch, T tokens, K heads, H numbers a head.
"""

import re

import jax
import jax.numpy as jnp

from beit_jax.models.constrain import constrain_batch, constrain_replicated

MULTIPLE = 8  # JAX lets cuDNN train at even lengths only, bias or not; its tiles like multiples of 8


def why_not_cudnn(dtype: str, head_dim: int, platform: str, capability: str) -> str:
  """What keeps cuDNN's kernel from running: "" if nothing does.

  Args:
    dtype: of the computation.
    platform, capability: of the device, as JAX names them: "gpu", "8.0" (of a CUDA device; others have other forms).
  """
  if platform != "gpu" or not re.fullmatch(r"\d+\.\d+", capability):
    return f"it needs a CUDA GPU, this is {platform} {capability}".rstrip()
  generation = tuple(map(int, capability.split(".")))
  largest = 256 if generation >= (9, 0) else 128
  if generation < (8, 0):
    return f"it needs compute capability 8.0 or more, this device has {capability}"
  if dtype not in ("bfloat16", "float16"):
    return f"it computes in bfloat16 and float16, not in {dtype}"
  if head_dim % 8 or head_dim > largest:
    return f"it needs heads of a multiple of 8, up to {largest}; these have {head_dim}"
  return ""


def choose(requested: str, dtype: str, head_dim: int) -> tuple[str, str]:
  """("xla" or "cudnn", why) on this process's first device; "cudnn" that cannot run becomes "xla"."""
  if requested == "xla":
    return "xla", "as asked"
  device = jax.local_devices()[0]
  reason = why_not_cudnn(dtype, head_dim, device.platform, str(getattr(device, "compute_capability", "")))
  return ("xla", f"cuDNN: {reason}") if reason else ("cudnn", f"{dtype} on {device.device_kind}")


def padded_length(tokens: int) -> int:
  """How many tokens cuDNN's kernel is given for so many."""
  length = -(-tokens // MULTIPLE) * MULTIPLE
  # 64 above a multiple of 128 its backward kernel on Hopper does not mask the end of the last tile: NaN where all
  # logits of a query are below -88 (pytorch#196678, cudnn-frontend#628; cuDNN 9.20, others not known).
  return length + MULTIPLE * (length % 128 == 64)


def padded_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, implementation: str
) -> jax.Array:
  """`jax.nn.dot_product_attention` at `padded_length` tokens; the same numbers, gradients included.

  Added keys get a bias that no softmax notices; added queries are cut off again.

  Args:
    query, key, value: [B, T, K, H].
    bias: [1, K, T, T] or None.
    implementation: "xla" or "cudnn".
  """
  tokens, heads = query.shape[1:3]
  more = padded_length(tokens) - tokens
  if more:
    query, key, value = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (query, key, value))
    if bias is None:
      # Of all heads: the shape of a bias whose gradient, which JAX asks for in any case, cuDNN has had the longest.
      bias = jnp.zeros((1, heads, tokens, tokens), query.dtype)
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, more), (0, more)))
    # JAX's own numbers for masked keys: of larger ones cuDNN subtracts one from another and returns NaN.
    nothing = -(2.0**15) if bias.dtype == jnp.float16 else -(2.0**41)
    bias = jnp.where(jnp.arange(tokens + more) < tokens, bias, jnp.asarray(nothing, bias.dtype))
  # The kernel cannot be cut along any axis but batch and heads, and demands one sharding of all three; under FSDP XLA
  # would spread each as its own weights are. XLA's attention is cut as XLA likes, and is not told.
  query, key, value = map(constrain_batch, (query, key, value))
  bias = None if bias is None else constrain_replicated(bias)
  out = jax.nn.dot_product_attention(query, key, value, bias=bias, implementation=implementation)
  return constrain_batch(out)[:, :tokens]


def attention(
  query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, requested: str
) -> jax.Array:
  """softmax(query key^T / sqrt(H) + bias) value: [B, T, K, H] of the same, bias [1, K, T, T] or None."""
  if bias is not None:
    bias = bias.astype(query.dtype)
  if choose(requested, query.dtype.name, query.shape[-1])[0] == "cudnn":
    return padded_attention(query, key, value, bias, "cudnn")
  return jax.nn.dot_product_attention(query, key, value, bias=bias)
