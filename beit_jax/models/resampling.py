"""Resampling of feature maps by PyTorch's rules.

Each function multiplies by two small constant matrices, for rows and columns. The gradients are matrix products too,
whereas that of a gather would be a scatter. `jax.image.resize` cannot replace them: it antialiases when it shrinks,
F.interpolate does not.
Shapes: B = batch size, h, w = source size, H, W = target size, C = channels.
"""

import jax
import jax.numpy as jnp
import numpy as np


def bilinear_matrix(source: int, target: int) -> np.ndarray:
  """[target, source] weights of F.interpolate(mode="bilinear", align_corners=False)."""
  position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
  lower = np.floor(position).astype(int)
  upper = np.minimum(lower + 1, source - 1)
  weights, rows = np.zeros((target, source)), np.arange(target)
  np.add.at(weights, (rows, lower), 1 - (position - lower))
  np.add.at(weights, (rows, upper), position - lower)
  return weights


def bicubic_matrix(source: int, target: int, offset: float = 0.0) -> np.ndarray:
  """[target, source] weights of PyTorch's bicubic resize: a = -0.75, half-pixel centers, no antialiasing.

  Args:
    source: Number of values.
    target: Number of values of the result.
    offset: Is added to `target` for the scale alone. DINO resizes positions by (target + 0.1) / source.
  """
  position = (np.arange(target) + 0.5) * source / (target + offset) - 0.5
  first, a = np.floor(position).astype(int) - 1, -0.75
  weights = np.zeros((target, source))
  for tap in range(4):
    d = np.abs(position - first - tap)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    np.add.at(weights, (np.arange(target), np.clip(first + tap, 0, source - 1)), np.where(d <= 1, near, far))
  return weights


def adaptive_pool_matrix(source: int, target: int) -> np.ndarray:
  """[target, source] weights of AdaptiveAvgPool2d: window i of k is floor(i * n / k) to ceil((i + 1) * n / k)."""
  weights = np.zeros((target, source))
  for i in range(target):
    start, stop = i * source // target, -(-(i + 1) * source // target)
    weights[i, start:stop] = 1 / (stop - start)
  return weights


def _apply(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  x = jnp.einsum("yi,bijc->byjc", jnp.asarray(rows, x.dtype), x, precision="highest")
  return jnp.einsum("xj,byjc->byxc", jnp.asarray(columns, x.dtype), x, precision="highest")


def resize_bilinear(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
  """Bilinear resizing without antialiasing, in the dtype of `x`: [B, h, w, C] -> [B, H, W, C]."""
  if tuple(x.shape[1:3]) == tuple(size):
    return x
  return _apply(x, bilinear_matrix(x.shape[1], size[0]), bilinear_matrix(x.shape[2], size[1]))


def adaptive_average_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Adaptive average pooling, in the dtype of `x`: [B, h, w, C] -> [B, H, W, C], which can be larger."""
  return _apply(x, adaptive_pool_matrix(x.shape[1], size[0]), adaptive_pool_matrix(x.shape[2], size[1]))


def max_pool_2x2(x: jax.Array) -> jax.Array:
  """MaxPool2d(2): [B, h, w, C] -> [B, h // 2, w // 2, C]. An odd last row or column is dropped.

  The maximum is taken between halves, first of rows, then of columns. A reduction over windows is slower on CPU, and
  its gradient compares input and result: if the compiler computes the result twice with different rounding, the
  gradient is NaN, which happened in UPerNet.

  Raises:
    ValueError: The map is too small.
  """
  height, width = x.shape[1:3]
  if min(height, width) < 2:
    raise ValueError(
      f"a map of {height}x{width} cannot be halved; the image must have at least two patches per side"
    )
  x = x[:, : height // 2 * 2, : width // 2 * 2]
  for axis in (1, 2):
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    x = jnp.maximum(*(half.squeeze(axis + 1) for half in jnp.split(pairs, 2, axis + 1)))
  return x
