"""Tensors of other people's files: known by name and shape, read one at a time, joined and cut on the way."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from beit_jax.data.images import RESAMPLE
from beit_jax.errors import UserError
from beit_jax.runtime.logs import log


@dataclasses.dataclass(frozen=True)
class Lazy:
  """A tensor with the interface of the file readers: `shape`, `read()`."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


FLOATS = [np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]
State = dict[str, Any]  # name -> a thing with `shape` and `read()`, in PyTorch's layout
# Transposed convolutions: PyTorch has [in, out, kh, kw].
TRANSPOSED = re.compile(r"(^|/)fpn(1/up_\d|2)/kernel$")


@dataclasses.dataclass
class Source:
  """What a file gave, in unilm's names: tensors, and everything else it says of the model.

  Attributes:
    state: the tensors, under the names of unilm's `modeling_finetune.py` / `modeling_pretrain.py`.
    path, format: where it came from.
    fields: what is known of the encoder's fields apart from the shapes, e.g. num_heads, norm_eps, image_size.
    preprocessing: as `Pretrained.preprocessing`, or None when the file does not say.
    labels: names of the classes, possibly empty.
    assumed: which of these are guesses all the same.
    described: our own description, when the file carries one.
    left_out: names of tensors that were dropped before.
  """

  state: State
  path: Path
  format: str
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)
  preprocessing: dict[str, Any] | None = None
  labels: list[str] = dataclasses.field(default_factory=list)
  assumed: list[str] = dataclasses.field(default_factory=list)
  described: dict[str, Any] = dataclasses.field(default_factory=dict)
  left_out: list[str] = dataclasses.field(default_factory=list)


def joined(parts: list[Any]) -> Lazy:
  """Concatenation along the first axis."""
  shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
  return Lazy(shape, lambda: np.concatenate([part.read() for part in parts]))


def rows(part: Any, start: int, stop: int) -> Lazy:
  """A cut along the first axis."""
  return Lazy((stop - start, *part.shape[1:]), lambda: part.read()[start:stop])


def to_params(array: np.ndarray, name: str) -> np.ndarray:
  """PyTorch's layout -> ours, by our name: [out, in] -> [in, out], [out, in, kh, kw] -> [kh, kw, in, out]; float32."""
  if array.dtype not in FLOATS:
    raise UserError(f"{name}: the file holds {array.dtype} there; expected floating-point numbers")
  if TRANSPOSED.search(name):
    array = array.transpose(2, 3, 0, 1)
  elif name.endswith("/kernel"):
    array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
  return np.array(array, np.float32, order="C")


def to_torch(array: Any, name: str) -> np.ndarray:
  """The inverse of `to_params`, as a view; float32."""
  array = np.asarray(array, np.float32)
  if TRANSPOSED.search(name):
    array = array.transpose(2, 3, 0, 1)
  elif name.endswith("/kernel"):
    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
  return array


def torch_shape(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
  """The shape that a parameter of ours has in PyTorch."""
  return to_torch(np.broadcast_to(np.float32(0), shape), name).shape


def report(title: str, rows_: list[tuple[str, str, tuple[int, ...]]], left_out: list[str]) -> None:
  """Logs (level DEBUG) what became of every tensor: rows of (name there, name here, shape)."""
  first, second = (max([len(row[i]) for row in rows_] or [0]) for i in (0, 1))
  lines = [f"  {a:<{first}}  {b:<{second}}  {tuple(shape)}" for a, b, shape in rows_]
  lines += [f"  {name:<{first}}  left out" for name in left_out]
  log.debug("%s: %d tensors, %d left out\n%s", title, len(rows_), len(left_out), "\n".join(lines))


def check_preprocessing(p: dict[str, Any], path: Path) -> dict[str, Any]:
  """The same, or a UserError that says what of it is not as it should be."""
  number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)  # noqa: E731
  three = lambda v: isinstance(v, list | tuple) and len(v) == 3 and all(map(number, v))  # noqa: E731
  rules = dict(
    mean=(three, "three numbers"),
    std=(lambda v: three(v) and 0 not in v, "three numbers other than 0"),
    crop_pct=(lambda v: number(v) and 0.1 <= v <= 2, "a number between 0.1 and 2"),
    interpolation=(lambda v: v in list(RESAMPLE), f"one of {', '.join(RESAMPLE)}"),
    resize=(lambda v: v in ("short_side", "squash"), "'short_side' or 'squash'"),
  )
  for key, (good, expected) in rules.items():
    if not good(p.get(key)):
      raise UserError(f"{path}: its preprocessing has {key}={p.get(key)!r}, expected {expected}")
  return p
