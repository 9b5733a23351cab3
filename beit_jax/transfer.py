"""Fits the weights of one model to another: from pre-training to fine-tuning, to another grid or another head.

References:
  unilm `beit/run_class_finetuning.py`, checkpoint conversion. Unlike there, grids need not be square: each axis gets
  its own geometric progression.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from beit_jax import trees
from beit_jax.errors import UserError
from beit_jax.models.resampling import bicubic_matrix

EXTRA_ROWS = 3  # cls -> patch, patch -> cls, cls -> cls: the last rows of a relative-position table
TABLE = "relative_position_bias_table"
PATCH_EMBED = "encoder/patch_embed/kernel"
SHARED_TABLE = f"encoder/rel_pos_bias/{TABLE}"  # of a model whose blocks share one


def geometric_ratio(source: int, target: int) -> float:
  """The ratio q in [1.01, 1.5] of the progression 1 + q + q^2 + ... that reaches target//2 in source//2 steps.

  Found by bisection to a width of 1e-6; like the reference, returns the last midpoint.
  """
  low, high, ratio = 1.01, 1.5, 1.01
  while high - low > 1e-6:
    ratio = (low + high) / 2.0
    reach = (1.0 - ratio ** (source // 2)) / (1.0 - ratio)
    low, high = (low, ratio) if reach > target // 2 else (ratio, high)
  return ratio


def _cubic_spline(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """Weights [len(wanted), len(known)] of the interpolating cubic spline with not-a-knot ends.

  For up to three known points there is no such spline; the result is then the polynomial through all of them.
  """
  n, identity = len(known), np.eye(len(known))
  if n < 4:
    others = [[(wanted - known[j]) / (known[i] - known[j]) for j in range(n) if j != i] for i in range(n)]
    return np.stack([np.prod([np.ones(len(wanted)), *factors], 0) for factors in others], -1)
  h = np.diff(known)
  # Second derivatives at the known points, one row per point; the outer rows make the third derivative continuous.
  left, right = np.zeros((n, n)), np.zeros((n, n))
  left[0, :3] = h[1], -h[0] - h[1], h[0]
  left[-1, -3:] = h[-1], -h[-2] - h[-1], h[-2]
  for i in range(1, n - 1):
    left[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
    right[i, i - 1 : i + 2] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
  second = np.linalg.solve(left, right)
  k = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, n - 2)
  b = ((wanted - known[k]) / h[k])[:, None]
  a, scale = 1 - b, (h[k] ** 2 / 6)[:, None]
  return a * identity[k] + b * identity[k + 1] + scale * ((a**3 - a) * second[k] + (b**3 - b) * second[k + 1])


def _axis_weights(source: int, target: int) -> np.ndarray:
  """Weights [target, source] from a geometric to an even grid of offsets."""
  if source == target:
    return np.eye(source)
  ratio = geometric_ratio(source, target)
  distances = np.cumsum(ratio ** np.arange(source // 2))
  known = np.concatenate([-distances[::-1], [0.0], distances])
  wanted = np.arange(-(target // 2), target // 2 + 0.1)
  # The reference (FITPACK) repeats the border value outside the known range.
  return _cubic_spline(known, np.clip(wanted, known[0], known[-1]))


def resize_rel_pos_table(table: Any, src_grid: tuple[int, int], dst_grid: tuple[int, int]) -> np.ndarray:
  """Resizes a relative-position table for another grid; the bias of near neighbors stays.

  Args:
    table: [(2h-1)(2w-1)+3, heads].
    src_grid: (h, w) of the table.
    dst_grid: (h, w) of the result.

  Returns:
    The table for `dst_grid`, in the dtype of `table`. The last three rows are copied.

  Raises:
    ValueError: the number of rows does not belong to `src_grid`.
  """
  table = np.asarray(table)
  (sh, sw), (dh, dw) = ([2 * side - 1 for side in grid] for grid in (src_grid, dst_grid))
  if len(table) != sh * sw + EXTRA_ROWS:
    raise ValueError(f"a table for grid {src_grid} has {sh * sw + EXTRA_ROWS} rows, this one {len(table)}")
  if tuple(src_grid) == tuple(dst_grid):
    return table
  body, extra = table[:-EXTRA_ROWS].astype(np.float64).reshape(sh, sw, -1), table[-EXTRA_ROWS:]
  body = np.einsum("yi,xj,ijk->yxk", _axis_weights(sh, dh), _axis_weights(sw, dw), body, optimize=True)
  return np.concatenate([body.reshape(dh * dw, -1), extra]).astype(table.dtype)


def resize_pos_embed(pos_embed: Any, src_grid: tuple[int, int], dst_grid: tuple[int, int]) -> np.ndarray:
  """Resizes a table of absolute positions as PyTorch's bicubic does; the row of the cls token is copied.

  Args:
    pos_embed: [1, 1 + h*w, D].
    src_grid: (h, w) of the table.
    dst_grid: (h, w) of the result.

  Returns:
    The table for `dst_grid`, in the dtype of `pos_embed`.

  Raises:
    ValueError: the shape does not belong to `src_grid` and a cls token.
  """
  pos_embed = np.asarray(pos_embed)
  width = pos_embed.shape[-1]
  if pos_embed.shape[1] != 1 + src_grid[0] * src_grid[1]:
    raise ValueError(
      f"pos_embed of shape {pos_embed.shape} does not belong to a grid {src_grid} and a cls token"
    )
  if tuple(src_grid) == tuple(dst_grid):
    return pos_embed
  patches = pos_embed[0, 1:].astype(np.float64).reshape(*src_grid, width)
  rows, columns = (bicubic_matrix(*sides) for sides in zip(src_grid, dst_grid, strict=True))
  patches = np.einsum("yi,xj,ijk->yxk", rows, columns, patches, optimize=True).reshape(1, -1, width)
  return np.concatenate([pos_embed[:, :1], patches.astype(pos_embed.dtype)], 1)


def adapt_channels(kernel: Any, channels: int) -> np.ndarray:
  """Fits the kernel of a patch embedding for RGB to images of other channels, as timm's `adapt_input_conv`.

  Args:
    kernel: [P, P, 3, D].
    channels: C. One channel gets the sum of the three; more get copies of them in turn, scaled by 3 / C.

  Returns:
    [P, P, C, D], in the dtype of `kernel`.
  """
  kernel = np.asarray(kernel)
  if channels == 1:
    return kernel.sum(2, keepdims=True, dtype=kernel.dtype)
  return (kernel[:, :, np.arange(channels) % 3] * (3 / channels)).astype(kernel.dtype)


def encoder_params(
  source: dict[str, Any],
  target: dict[str, Any],
  src_grid: tuple[int, int],
  dst_grid: tuple[int, int],
  report: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
  """Fits the parameters of one BEiT model to the tree of another.

  Args:
    source: nested parameters of a model with an encoder on `src_grid`.
    target: fresh parameters (or shapes) of the model to start; they give names and shapes.
    src_grid: (h, w) of the source.
    dst_grid: (h, w) of the target.
    report: is called with one line for everything that is not a plain copy.

  Returns:
    The parameters that replace the target's, by flat name: all of the encoder, and the head if it fits.

  Raises:
    UserError: parameters of the encoder are missing, unexpected or have another shape; lists all of them.
  """
  src, dst = trees.flatten(source), trees.flatten(target)
  found: dict[str, Any] = {}
  problems = []
  for name, wanted in dst.items():
    value = _fitting_value(name, src, src_grid, dst_grid)
    if name == PATCH_EMBED and value is not None and value.shape[2] == 3 != wanted.shape[2]:
      value = adapt_channels(value, wanted.shape[2])
      report(f"{name}: adapted from 3 to {wanted.shape[2]} channels")
    shape = "nothing" if value is None else tuple(value.shape)
    if shape == tuple(wanted.shape):
      found[name] = value
    elif name.startswith("encoder/"):
      problems.append(f"{name}: expected {tuple(wanted.shape)}, found {shape}")
    else:
      report(f"{name}: starts fresh, {wanted.shape}" + ("" if value is None else f", instead of {shape}"))
  # What only pre-training uses may be left over.
  optional = ("encoder/norm/", "encoder/mask_token", SHARED_TABLE)
  for name, value in src.items():
    if name.startswith("encoder/") and name not in found and not name.startswith(optional):
      problems.append(f"{name}: unexpected, {tuple(value.shape)}")
  if problems:
    raise UserError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
  _report_changes(src, dst, found, src_grid, dst_grid, report)
  return found


def resize_positions(
  params: dict[str, Any], src_grid: tuple[int, int], dst_grid: tuple[int, int]
) -> dict[str, Any]:
  """Resizes all position parameters in the tree of a model for another grid; the others stay the same objects.

  Args:
    params: nested parameters of a model on `src_grid`.
    src_grid: (h, w) of the parameters.
    dst_grid: (h, w) of the result.
  """
  flat = trees.flatten(params)
  return trees.unflatten({name: _fitting_value(name, flat, src_grid, dst_grid) for name in flat})


def _fitting_value(
  name: str, src: dict[str, Any], src_grid: tuple[int, int], dst_grid: tuple[int, int]
) -> Any:
  """The source's value of a parameter, on the target's grid; None if there is none."""
  value = src.get(name)
  if value is None and name.endswith(f"attn/{TABLE}"):
    value = src.get(SHARED_TABLE)
  if value is None or src_grid == dst_grid:
    return value
  if name.endswith(TABLE):
    return resize_rel_pos_table(value, src_grid, dst_grid)
  return resize_pos_embed(value, src_grid, dst_grid) if name.endswith("pos_embed") else value


def _report_changes(
  src: dict[str, Any],
  dst: dict[str, Any],
  found: dict[str, Any],
  src_grid: tuple[int, int],
  dst_grid: tuple[int, int],
  report: Callable[[str], None],
) -> None:
  if SHARED_TABLE in src and any(name.endswith(f"attn/{TABLE}") for name in dst):
    report("the shared relative-position table was copied to every block")
  if src_grid != dst_grid:
    report(f"position parameters were resized from grid {src_grid} to {dst_grid}")
    if dst_grid[0] < src_grid[0] or dst_grid[1] < src_grid[1]:
      report("warning: for a smaller grid the geometric rule crops the table instead of shrinking it")
  unused = {name if name.startswith("encoder/") else name.split("/")[0] for name in src if name not in found}
  if unused:
    report(f"not used of the checkpoint: {', '.join(sorted(unused))}")
