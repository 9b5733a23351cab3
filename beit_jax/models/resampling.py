"""Resampling of feature maps with constant matrices, PyTorch's rules.

Letters: B batch, h w source, H W target, C channels.
Two small matrix products, rows then columns: their gradients are matrix products too, where a gather's would be a
scatter. Not `jax.image.resize`, which smooths when it shrinks; mmseg's `resize` (F.interpolate) does not.
"""

import jax
import jax.numpy as jnp
import numpy as np


def bilinear_matrix(source: int, target: int) -> np.ndarray:
  """[target, source] weights of F.interpolate(bilinear, align_corners=False): half-pixel centres, border repeated."""
  position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
  lower = np.floor(position).astype(int)
  upper = np.minimum(lower + 1, source - 1)
  weights, rows = np.zeros((target, source)), np.arange(target)
  np.add.at(weights, (rows, lower), 1 - (position - lower))
  np.add.at(weights, (rows, upper), position - lower)
  return weights


def adaptive_pool_matrix(source: int, target: int) -> np.ndarray:
  """[target, source] weights of AdaptiveAvgPool2d: window i of k is floor(i * n / k) .. ceil((i + 1) * n / k)."""
  weights = np.zeros((target, source))
  for i in range(target):
    start, stop = i * source // target, -(-(i + 1) * source // target)
    weights[i, start:stop] = 1 / (stop - start)
  return weights


def _apply(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  rows, columns = (jnp.asarray(matrix, x.dtype) for matrix in (rows, columns))
  x = jnp.einsum("yi,bijc->byjc", rows, x, precision="highest")
  return jnp.einsum("xj,byjc->byxc", columns, x, precision="highest")


def resize_bilinear(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """[B, h, w, C] -> [B, H, W, C] in the dtype of `x`; no antialiasing."""
  if tuple(x.shape[1:3]) == tuple(size):
    return x
  return _apply(x, bilinear_matrix(x.shape[1], size[0]), bilinear_matrix(x.shape[2], size[1]))


def adaptive_average_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """[B, h, w, C] -> [B, H, W, C] in the dtype of `x`; the target may be larger than the source."""
  return _apply(x, adaptive_pool_matrix(x.shape[1], size[0]), adaptive_pool_matrix(x.shape[2], size[1]))


def max_pool_2x2(x: jax.Array) -> jax.Array:
  """[B, h, w, C] -> [B, h // 2, w // 2, C]; an odd last row or column is dropped, as by MaxPool2d(2).

  Two maxima of halves: a reduction, over a window or reshaped, is slower on CPU, both ways, and its gradient compares
  its input with its result, which a compiler may have computed twice, not to the same bit: NaN, seen in UPerNet.
  """
  height, width = x.shape[1:3]
  if min(height, width) < 2:
    raise ValueError(
      f"a map of {height}x{width} cannot be halved; the image needs two patches a side or more"
    )
  x = x[:, : height // 2 * 2, : width // 2 * 2]
  for axis in (1, 2):
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    x = jnp.maximum(*(half.squeeze(axis + 1) for half in jnp.split(pairs, 2, axis + 1)))
  return x
