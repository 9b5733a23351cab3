"""Counts images that cannot be read, logs each once, and stops the run if there are too many."""

import json
import math
from pathlib import Path

import numpy as np

from beit_jax.data.examples import Reader, read_error
from beit_jax.data.sources import Source
from beit_jax.errors import UserError
from beit_jax.run.files import read_json_lines
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log

# How far a sample must exceed the allowed share before the run stops: chance does so in less than one run in 1,000.
DEVIATIONS, MARGIN = 4, 2
MAX_LOGGED = 20  # images in the log; the file lists all of them


class BadImageTracker:
  """Records the examples that `pipeline` replaced, and stops the run if there are too many.

  It counts the distinct examples replaced among the last len(source) examples since this start. Repeats, old transient
  errors and errors before a repair therefore do not add up. The run stops when the count exceeds
  max_share * len(source). In a random order it stops sooner: when, of m examples seen, more than
  max_share * m + 4 sqrt(max_share * m) + 2 were replaced. So a run stops in its first batches if half of the data is
  broken, while a share of up to max_share stops less than one run in a thousand.

  With several processes, each counts the rows that it reads, in training also a random sample. An evaluation adds up
  the counts at its end and calls `check`.

  Args:
    source: the data.
    max_share: allowed share of all examples.
    path: a JSON line {"index", "reason"} is appended for each bad example; existing lines are read back.
    shuffled: whether the order is random. If not, as in evaluation, damaged examples may lie close together.
    reader: what reads the examples, if it finds more wrong than a file that cannot be decoded.

  Attributes:
    reasons: index -> reason, of every bad example found so far, including earlier starts.
  """

  def __init__(
    self,
    source: Source,
    max_share: float,
    path: Path | None = None,
    *,
    shuffled: bool = True,
    reader: Reader | None = None,
  ):
    if not 0 <= max_share <= 1:
      raise UserError(f"config key 'data.max_bad': {max_share} must lie in [0, 1]")
    self._source, self._max_share, self._path, self._shuffled = source, max_share, path, shuffled
    self._reader = reader
    self._file = None if path is None else bucket.local(path)
    self._seen = 0
    self._replaced_at: dict[int, int] = {}  # index -> examples seen when it was last replaced
    rows = [] if self._file is None else read_json_lines(self._file)
    self.reasons = {row["index"]: str(row.get("reason")) for row in rows if isinstance(row.get("index"), int)}

  @property
  def count(self) -> int:
    """Number of distinct examples replaced recently; see the class."""
    return len(self._replaced_at)

  def update(self, indices: np.ndarray, replaced: np.ndarray) -> None:
    """Records one batch.

    Args:
      indices: int [b], the examples of the batch.
      replaced: bool [b], whether another example replaced this one.

    Raises:
      UserError: too many examples cannot be read.
    """
    self._seen += len(replaced)
    for index in map(int, indices[replaced]):
      self._replaced_at[index] = self._seen
      if index not in self.reasons:
        self._add(index)
    oldest = self._seen - len(self._source)
    self._replaced_at = {index: at for index, at in self._replaced_at.items() if at > oldest}
    self.check(self.count)

  def check(self, count: int) -> None:
    """Checks a number of bad examples, of this process or of all of them, against the limit.

    Raises:
      UserError: there are too many.
    """
    total = len(self._source)
    seen = min(self._seen, total)
    limit = self._max_share * total
    if self._shuffled:
      expected = self._max_share * seen
      limit = min(limit, expected + DEVIATIONS * math.sqrt(expected) + MARGIN)
    if count > limit:
      found = [self.reasons[index] for index in self._replaced_at]
      examples = "\n  ".join(found[:5] or ["the logs of the other processes name them"])
      raise UserError(
        f"{count} of {total if count > self.count else seen} examples could not be read (there are {total}), too many "
        f"for data.max_bad={self._max_share}:\n  {examples}\n"
        f"Repair or remove them ({self._path or 'the log'} lists them), or increase data.max_bad"
      )

  def _add(self, index: int) -> None:
    reason = read_error(self._source, index, self._reader)
    self.reasons[index] = reason
    if len(self.reasons) <= MAX_LOGGED:
      log.warning("replaced by another example: %s", reason)
    if self._file is not None:
      with self._file.open("ab+") as file:
        if file.seek(0, 2) and file.seek(-1, 2) and file.read(1) != b"\n":
          file.write(b"\n")  # a kill cut off the previous line
        file.write(json.dumps({"index": index, "reason": reason}).encode() + b"\n")
