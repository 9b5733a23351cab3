"""Weights of one model as the start of another: pre-training -> fine-tuning, another grid, another head.

Follows unilm `beit/run_class_finetuning.py` (checkpoint conversion) and handles what that refuses: grids that
are not square (each axis gets its own progression).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from beit_jax import trees
from beit_jax.errors import UserError

EXTRA_ROWS = 3  # cls -> patch, patch -> cls, cls -> cls: the last rows of a relative-position table
TABLE = "relative_position_bias_table"


def geometric_ratio(source: int, target: int) -> float:
  """Ratio q in [1.01, 1.5] of the progression 1 + q + q^2 + ... that takes source//2 steps to target//2.

  By bisection to width 1e-6; the last midpoint, as the reference.
  """
  low, high, ratio = 1.01, 1.5, 1.01
  while high - low > 1e-6:
    ratio = (low + high) / 2.0
    reach = (1.0 - ratio ** (source // 2)) / (1.0 - ratio)
    low, high = (low, ratio) if reach > target // 2 else (ratio, high)
  return ratio


def _cubic_spline(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """[len(wanted), len(known)] weights of the interpolating cubic spline, not-a-knot at both ends.

  Up to three known points there is no such spline; then it is the polynomial through all of them.
  """
  n, identity = len(known), np.eye(len(known))
  if n < 4:
    others = [[(wanted - known[j]) / (known[i] - known[j]) for j in range(n) if j != i] for i in range(n)]
    return np.stack([np.prod([np.ones(len(wanted)), *factors], 0) for factors in others], -1)
  h = np.diff(known)
  # Second derivatives at the known points: one row per point, the outer two say "third derivative continuous".
  left, right = np.zeros((n, n)), np.zeros((n, n))
  left[0, :3] = h[1], -h[0] - h[1], h[0]
  left[-1, -3:] = h[-1], -h[-2] - h[-1], h[-2]
  for i in range(1, n - 1):
    left[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
    right[i, i - 1 : i + 2] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
  second = np.linalg.solve(left, right)
  i = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, n - 2)
  b = ((wanted - known[i]) / h[i])[:, None]
  a, scale = 1 - b, (h[i] ** 2 / 6)[:, None]
  return a * identity[i] + b * identity[i + 1] + scale * ((a**3 - a) * second[i] + (b**3 - b) * second[i + 1])


def _axis_weights(source: int, target: int) -> np.ndarray:
  """[target, source] weights from a geometric to an even grid of offsets."""
  if source == target:
    return np.eye(source)
  ratio = geometric_ratio(source, target)
  distances = np.cumsum(ratio ** np.arange(source // 2))
  known = np.concatenate([-distances[::-1], [0.0], distances])
  wanted = np.arange(-(target // 2), target // 2 + 0.1)
  # FITPACK, behind the reference, repeats the border value outside the known range.
  return _cubic_spline(known, np.clip(wanted, known[0], known[-1]))


def resize_rel_pos_table(table: Any, src_grid: tuple[int, int], dst_grid: tuple[int, int]) -> np.ndarray:
  """Relative-position table for another grid, keeping the bias of near neighbours.

  Args:
    table: [(2h-1)(2w-1)+3, heads] for `src_grid` (h, w); square or not.

  Returns:
    The table for `dst_grid`, in the dtype of `table`; the last three rows are copied.

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


def _bicubic(source: int, target: int) -> np.ndarray:
  """[target, source] weights of PyTorch's bicubic: a = -0.75, half-pixel centres, border repeated, no antialiasing."""
  position = (np.arange(target) + 0.5) * source / target - 0.5
  first, a = np.floor(position).astype(int) - 1, -0.75
  weights = np.zeros((target, source))
  for tap in range(4):
    d = np.abs(position - first - tap)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    np.add.at(weights, (np.arange(target), np.clip(first + tap, 0, source - 1)), np.where(d <= 1, near, far))
  return weights


def resize_pos_embed(pos_embed: Any, src_grid: tuple[int, int], dst_grid: tuple[int, int]) -> np.ndarray:
  """[1, 1 + h*w, D] -> [1, 1 + h'*w', D]: bicubic as PyTorch's, the cls token's copied.

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
  rows, columns = (_bicubic(*sides) for sides in zip(src_grid, dst_grid, strict=True))
  patches = np.einsum("yi,xj,ijk->yxk", rows, columns, patches, optimize=True).reshape(1, -1, width)
  return np.concatenate([pos_embed[:, :1], patches.astype(pos_embed.dtype)], 1)


def encoder_params(
  source: dict[str, Any],
  target: dict[str, Any],
  src_grid: tuple[int, int],
  dst_grid: tuple[int, int],
  say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
  """Fits the parameters of one BEiT model to the tree of another.

  Args:
    source: params of a masked-image or classification model on `src_grid`, nested, with `encoder`.
    target: freshly initialised params (or shapes) of the model to start; gives names and shapes.
    say: receives one line for everything that is not a plain copy.

  Returns:
    The flat names and values that replace the target's: every encoder parameter, and the head where it fits.

  Raises:
    UserError: lists all parameters that are missing or mis-shaped at once.
  """
  src, dst, found = trees.flatten(source), trees.flatten(target), {}
  shared = src.get(f"encoder/rel_pos_bias/{TABLE}")
  problems = []
  for name, wanted in dst.items():
    value = src.get(name)
    if value is None and name.endswith(f"attn/{TABLE}") and shared is not None:
      value = shared
    if value is not None and name.endswith(TABLE) and src_grid != dst_grid:
      value = resize_rel_pos_table(value, src_grid, dst_grid)
    if value is not None and name.endswith("pos_embed") and src_grid != dst_grid:
      value = resize_pos_embed(value, src_grid, dst_grid)
    if not name.startswith("encoder/"):
      if value is None or value.shape != wanted.shape:
        say(
          f"{name}: starts fresh, {wanted.shape}" + ("" if value is None else f", instead of {value.shape}")
        )
        continue
    if value is None:
      problems.append(f"{name} is missing, expected {tuple(wanted.shape)}")
    elif value.shape != wanted.shape:
      problems.append(f"{name} has shape {tuple(value.shape)}, expected {tuple(wanted.shape)}")
    else:
      found[name] = value
  used = set(found) | {
    n for n in src if n.startswith(("encoder/norm/", "encoder/mask_token", "encoder/rel_pos_bias"))
  }
  problems += [
    f"{n} is unexpected, {tuple(v.shape)}"
    for n, v in src.items()
    if n.startswith("encoder/") and n not in used
  ]
  if problems:
    raise UserError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
  if shared is not None and any(n.endswith(f"attn/{TABLE}") for n in dst):
    say("the shared relative-position table was copied to every block")
  if src_grid != dst_grid:
    say(f"position parameters were resized from grid {src_grid} to {dst_grid}")
    if dst_grid[0] < src_grid[0] or dst_grid[1] < src_grid[1]:
      say("warning: to a smaller grid the geometric rule crops the table rather than shrinks it")
  dropped = sorted({n.split("/")[0] if not n.startswith("encoder/") else n for n in src if n not in found})
  if dropped:
    say(f"not used of the checkpoint: {', '.join(dropped)}")
  return found
