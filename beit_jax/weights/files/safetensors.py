"""Reads and writes .safetensors files with the library of that name; reading loads one tensor at a time.

Every error is a UserError that names the file.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from beit_jax.errors import UserError
from beit_jax.weights.files.lazy import LazyTensor

# The format also has types that NumPy lacks, such as 8-bit floats.
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def is_safetensors(path: Path) -> bool:
  """Whether the file starts like one: an 8-byte length and a JSON object, and not like a zip archive."""
  with path.open("rb") as file:
    start = file.read(9)
  return len(start) == 9 and start[8:] == b"{" and start[:4] != b"PK\x03\x04"


def read(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
  """Opens a file without reading its tensors.

  Returns:
    (tensors by name, the metadata of the header).

  Raises:
    UserError: the header is invalid, does not fit the file, or has a data type that NumPy lacks.
  """
  tensors: dict[str, LazyTensor] = {}
  try:
    with safe_open(path, framework="np") as file:
      _check_unique_names(path)
      for name in file.keys():
        entry = file.get_slice(name)
        if entry.get_dtype() not in DTYPES:
          raise UserError(f"{path}: {name!r} has the type {entry.get_dtype()}; known are {', '.join(DTYPES)}")
        read_tensor = functools.partial(_read_tensor, path, name)
        tensors[name] = LazyTensor(tuple(entry.get_shape()), read_tensor)
      return tensors, file.metadata() or {}
  except (SafetensorError, ValueError) as error:
    raise UserError(f"{path}: damaged or not a safetensors file: {error}") from None


def _check_unique_names(path: Path) -> None:
  """Refuses a header that lists a name twice, which the library accepts: JSON parsers disagree on its meaning."""

  def check(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
      raise ValueError("a name occurs twice in the header")

  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    json.loads(file.read(length), object_pairs_hook=check)


def _read_tensor(path: Path, name: str) -> np.ndarray:
  # Reopening the file costs less than a millisecond and leaves nothing mapped into memory.
  try:
    with safe_open(path, framework="np") as file:
      return file.get_tensor(name)
  except (SafetensorError, ValueError) as error:
    raise UserError(f"{path}: the tensor {name!r} cannot be read: {error}") from None


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
  """Writes the tensors; those that are not contiguous are copied, so this may hold a second copy of the model.

  Raises:
    OSError: the file cannot be written.
  """
  path.touch()
  mode = path.stat().st_mode
  try:
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, path, metadata)
  except SafetensorError as error:
    raise OSError(str(error)) from None
  path.chmod(mode)  # the library makes the file readable for its owner only
