"""The safetensors format: an 8-byte length, a JSON header, raw tensors. Reading believes nothing of the header.

Own code rather than the library, because it streams: reading takes one tensor at a time, writing copies one at a time.
Every error is a UserError that names the file.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from beit_jax.errors import UserError

DTYPES: dict[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


class FileTensor:
  """A tensor that stays in its file until `read()`; `shape` and `dtype` are known."""

  def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int):
    self.path, self.dtype, self.shape, self.offset = path, np.dtype(dtype), shape, offset

  def read(self) -> np.ndarray:
    array = np.fromfile(self.path, self.dtype, math.prod(self.shape), offset=self.offset)
    return array.reshape(self.shape)


def is_safetensors(path: Path) -> bool:
  with path.open("rb") as file:
    start = file.read(9)
  return len(start) == 9 and start[8:] == b"{" and start[:4] != b"PK\x03\x04"


def read(path: Path) -> tuple[dict[str, FileTensor], dict[str, str]]:
  """(tensors by name, the header's metadata).

  Raises:
    UserError: the header is not what the format says, or does not fit the file.
  """

  def refuse(reason):
    return UserError(f"{path}: damaged or not a safetensors file: {reason}")

  size = path.stat().st_size
  with path.open("rb") as file:
    (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    if length > min(size - 8, MAX_HEADER):
      raise refuse(f"the header claims {length} bytes, the file has {size}")
    raw = file.read(length)

  def unique(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
      raise refuse("a name occurs twice in the header")
    return dict(pairs)

  try:
    header = json.loads(raw, object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise refuse(f"the header is not JSON ({type(error).__name__})") from None
  if not isinstance(header, dict):
    raise refuse("the header is not a table")
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise refuse("the metadata are not texts")
  start, total, spans, tensors = 8 + length, size - 8 - length, [], {}
  whole = lambda values: (
    isinstance(values, list) and len(values) <= 8 and all(type(v) is int and 0 <= v < 2**48 for v in values)
  )  # noqa: E731
  for name, entry in header.items():
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
      raise refuse(f"{name!r} has the type {dtype!r}; known are {', '.join(DTYPES)}")
    if not whole(shape) or not whole(span) or len(span) != 2:
      raise refuse(f"{name!r} has shape {shape!r} and offsets {span!r}")
    count = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if span[1] > total or span[1] - span[0] != count:
      raise refuse(f"{name!r}, {dtype} {shape}, needs {count} bytes; its offsets are {span} of {total}")
    spans.append(tuple(span))
    tensors[name] = FileTensor(path, DTYPES[dtype], tuple(shape), start + span[0])
  end = 0
  for low, high in sorted(spans):
    if low != end:
      raise refuse(f"tensors overlap or leave a gap at byte {end}")
    end = high
  if end != total:
    raise refuse(f"{total - end} bytes belong to no tensor")
  return tensors, metadata


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
  """Writes the tensors in their order; views that are not contiguous are copied one at a time."""
  header: dict[str, Any] = {"__metadata__": metadata}
  end = 0
  for name, array in tensors.items():
    start, end = end, end + array.nbytes
    header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for array in tensors.values():
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
