"""Images that cannot be read: counted, named once each, and too many of them stop the run."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax import storage
from beit_jax.errors import BadImage, UserError
from beit_jax.logs import log

ENOUGH = 100  # examples to have seen before a share means anything
SHOWN = 20  # of them are named in the log; all are in the file


class Damage:
  """What `pipeline` reports the replaced examples of its batches to.

  Args:
    source: the data, to say which file it was, and why.
    max_share: of the examples read so far; above it the run stops.
    path: a JSON line {"index", "reason"} for each of them is added there; what it holds counts as known.

  Attributes:
    known: index -> reason, of every example found so far.
  """

  def __init__(self, source: Any, max_share: float, path: Path | None = None):
    if not 0 <= max_share <= 1:
      raise UserError(f"config key 'data.max_bad': {max_share} must lie in [0, 1]")
    self._source, self._share, self._path = source, max_share, path
    self._seen = self._replaced = 0
    self.known: dict[int, str] = {}
    self._file = path and storage.local(path)
    if path is not None and self._file.exists():
      self.known = dict(_read(self._file))

  def note(self, indices: np.ndarray, replaced: np.ndarray) -> None:
    """int [b] and bool [b] of one batch.

    Raises:
      UserError: there are too many.
    """
    self._seen, self._replaced = self._seen + len(replaced), self._replaced + int(replaced.sum())
    for index in map(int, indices[replaced]):
      if index not in self.known:
        self._add(index)
    if self._seen >= ENOUGH and self._replaced > self._share * self._seen:
      examples = "\n  ".join(list(self.known.values())[:5])
      raise UserError(
        f"{self._replaced} of {self._seen} examples could not be read, more than data.max_bad={self._share}:\n  "
        f"{examples}\nRepair or remove them ({self._path or 'the log names them'}), or allow more"
      )

  def _add(self, index: int) -> None:
    reason = why(self._source, index)
    self.known[index] = reason
    if len(self.known) <= SHOWN:
      log.warning("replaced by another example: %s", reason)
    if self._path is not None:
      with self._file.open("ab+") as file:
        if file.seek(0, 2) and file.seek(-1, 2) and file.read(1) != b"\n":
          file.write(b"\n")  # a kill has cut the line before off
        file.write(json.dumps({"index": index, "reason": reason}).encode() + b"\n")


def _read(path: Path) -> Iterator[tuple[int, str]]:
  for line in path.read_text(errors="replace").splitlines():
    with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off by a kill
      row = json.loads(line)
      yield int(row["index"]), str(row["reason"])


def why(source: Any, index: int) -> str:
  """Which example it is, and why it cannot be read."""
  from beit_jax.data import pipeline  # which imports this module

  try:
    pipeline.decode(source[index], index).pixels()
  except (BadImage, OSError) as error:
    return str(error)
  return f"example {index} could not be read a moment ago, and can now"
