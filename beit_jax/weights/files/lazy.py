"""Tensors of foreign files: known by name and shape, read one at a time, and converted on the way."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from beit_jax.data.resize import RESAMPLE
from beit_jax.errors import UserError
from beit_jax.runtime.logs import log


class Readable(Protocol):
  """A tensor in a file: the shape is known, the values are read on demand."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  def read(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A `Readable` made of a shape and a function."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


# Names and tensors, in PyTorch's layout: of a file that is read, and of one to be written.
State = Mapping[str, Readable]
Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]

FLOATS = [np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]
# Kernels of transposed convolutions: PyTorch has [in, out, kh, kw].
TRANSPOSED = re.compile(r"(^|/)fpn(1/up_\d|2)/kernel$")


@dataclasses.dataclass
class Source:
  """The content of a foreign file: its tensors under unilm's names, and everything else it says about the model.

  Attributes:
    state: the tensors, under the names of unilm's `modeling_finetune.py` and `modeling_pretrain.py`.
    path: the file.
    format: "unilm", "timm", "hf" or "dalle".
    fields: the encoder's fields that the file states, e.g. num_heads, norm_eps, image_size.
    preprocessing: as `Pretrained.preprocessing`, or None if the file does not state it.
    labels: names of the classes; may be empty.
    task: entries of the description on the outputs of a classifier: `multi_label` or `regression`.
    assumed: what among these is a guess.
    described: our own description, if the file carries one.
    left_out: names of tensors that were dropped already.
  """

  state: State
  path: Path
  format: str
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)
  preprocessing: dict[str, Any] | None = None
  labels: list[str] = dataclasses.field(default_factory=list)
  task: dict[str, bool] = dataclasses.field(default_factory=dict)
  assumed: list[str] = dataclasses.field(default_factory=list)
  described: dict[str, Any] = dataclasses.field(default_factory=dict)
  left_out: list[str] = dataclasses.field(default_factory=list)


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
  """Applies every rule (regex, replacement) to a name, in order."""
  for pattern, replacement in rules:
    name = re.sub(pattern, replacement, name)
  return name


def concatenate(parts: Sequence[Readable]) -> LazyTensor:
  """The concatenation along the first axis."""
  shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
  return LazyTensor(shape, lambda: np.concatenate([part.read() for part in parts]))


def rows(part: Readable, start: int, stop: int) -> LazyTensor:
  """The rows from `start` to `stop` along the first axis."""
  return LazyTensor((stop - start, *part.shape[1:]), lambda: part.read()[start:stop])


def reshape(tensor: Readable, shape: tuple[int, ...]) -> LazyTensor:
  """The tensor with another shape and the same number of values."""
  return LazyTensor(shape, lambda: tensor.read().reshape(shape))


def to_params(array: np.ndarray, name: str) -> np.ndarray:
  """Converts a tensor from PyTorch's layout to ours, in float32.

  Args:
    array: e.g. [out, in], which becomes [in, out], or [out, in, kh, kw], which becomes [kh, kw, in, out].
    name: the parameter's name in our tree, which decides the layout.

  Raises:
    UserError: the file holds integers.
  """
  if array.dtype not in FLOATS:
    raise UserError(f"{name}: the file holds {array.dtype} there; expected floating-point numbers")
  if TRANSPOSED.search(name):
    array = array.transpose(2, 3, 0, 1)
  elif name.endswith("/kernel"):
    array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
  return np.array(array, np.float32, order="C")


def to_torch(array: Any, name: str) -> np.ndarray:
  """The inverse of `to_params`: a float32 view in PyTorch's layout."""
  array = np.asarray(array, np.float32)
  if TRANSPOSED.search(name):
    return array.transpose(2, 3, 0, 1)
  if name.endswith("/kernel"):
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
  return array


def torch_shape(shape: Shape, name: str) -> Shape:
  """The shape that a parameter of ours has in PyTorch."""
  return to_torch(np.broadcast_to(np.float32(0), shape), name).shape


def report(title: str, tensors: Sequence[tuple[str, str, Shape]], left_out: Iterable[str]) -> None:
  """Logs at level DEBUG what became of every tensor, one line (foreign name, our name, shape) each."""
  left_out = list(left_out)
  first, second = (max([len(row[i]) for row in tensors] or [0]) for i in (0, 1))
  lines = [f"  {a:<{first}}  {b:<{second}}  {tuple(shape)}" for a, b, shape in tensors]
  lines += [f"  {name:<{first}}  left out" for name in left_out]
  log.debug("%s: %d tensors, %d left out\n%s", title, len(tensors), len(left_out), "\n".join(lines))


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_color(value: Any) -> bool:
  return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))


def check_preprocessing(p: dict[str, Any], path: Path) -> dict[str, Any]:
  """Returns a valid preprocessing as it is.

  Raises:
    UserError: a value is missing or out of range.
  """
  rules: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mean": (_is_color, "three numbers"),
    "std": (lambda v: _is_color(v) and 0 not in v, "three numbers other than 0"),
    "value_range": (
      lambda v: (
        v is None or (isinstance(v, list | tuple) and len(v) == 2 and all(map(_is_number, v)) and v[0] < v[1])
      ),
      "two numbers, the smaller one first",
    ),
    "crop_pct": (lambda v: _is_number(v) and 0.1 <= v <= 2, "a number between 0.1 and 2"),
    "interpolation": (lambda v: v in list(RESAMPLE), f"one of {', '.join(RESAMPLE)}"),
    "resize": (lambda v: v in ("short_side", "squash"), "'short_side' or 'squash'"),
  }
  for key, (is_valid, expected) in rules.items():
    if not is_valid(p.get(key)):
      raise UserError(f"{path}: its preprocessing has {key}={p.get(key)!r}, expected {expected}")
  return p
