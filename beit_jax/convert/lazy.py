"""Tensors of other people's files: known by name and shape, read one at a time, joined and cut on the way."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.logs import log


@dataclasses.dataclass(frozen=True)
class Lazy:
  """A tensor with the interface of the file readers: `shape`, `read()`."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


State = dict[str, Any]  # name -> a thing with `shape` and `read()`, in PyTorch's layout


@dataclasses.dataclass
class Source:
  """What a file gave, in unilm's names: tensors, and everything else it says of the model.

  Attributes:
    state: the tensors, under the names of unilm's `modeling_finetune.py` / `modeling_pretrain.py`.
    path, format: where it came from.
    fields: what is known of the encoder's fields apart from the shapes, e.g. num_heads, norm_eps, image_size.
    preprocessing: as `Pretrained.preprocessing`, or None when the file does not say.
    labels: names of the classes, possibly empty.
    described: our own description, when the file carries one.
    left_out: names of tensors that were dropped before.
  """

  state: State
  path: Path
  format: str
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)
  preprocessing: dict[str, Any] | None = None
  labels: list[str] = dataclasses.field(default_factory=list)
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
  if name.endswith("/kernel"):
    array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
  return np.array(array, np.float32, order="C")


def to_torch(array: Any, name: str) -> np.ndarray:
  """The inverse of `to_params`, as a view; float32."""
  array = np.asarray(array, np.float32)
  if name.endswith("/kernel"):
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
