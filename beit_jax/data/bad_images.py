"""Images that cannot be read: counted, named once each, and too many of them stop the run."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.data.examples import read_error
from beit_jax.errors import UserError
from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log

# By how much a sample must be above the share: by chance less than one run in 1,000 is.
DEVIATIONS, SPARE = 4, 2
SHOWN = 20  # of them are named in the log; all are in the file


class BadImageTracker:
  """What `pipeline` reports the replaced examples of its batches to; too many of them stop the run.

  Counted are the different examples replaced since the start, in the last epoch's worth of examples where more have
  been seen: no count of repeats, of errors that passed long ago, nor of an earlier start, after which files may have
  been repaired. The run stops when there are more than max_share * n, n being all examples there are. In a random
  order it need not wait so long: of m examples seen, more than max_share * m + 4 sqrt(max_share * m) + 2 are enough.
  So half of the data broken shows in the first batches, and a share of up to max_share stops less than one run in a
  thousand.

  Several processes each count the rows that they read, which in training is a random sample too; an evaluation adds
  them up at its end (`check`).

  Args:
    source: the data, to say which file it was, and why.
    max_share: of all examples.
    path: a JSON line {"index", "reason"} for each of them is added there; what it holds counts as reasons.
    shuffled: the order is random. Else, in an evaluation, a broken folder comes all at once.

  Attributes:
    reasons: index -> reason, of every example found so far, at earlier starts too.
  """

  def __init__(self, source: Any, max_share: float, path: Path | None = None, *, shuffled: bool = True):
    if not 0 <= max_share <= 1:
      raise UserError(f"config key 'data.max_bad': {max_share} must lie in [0, 1]")
    self._source, self._share, self._path, self._shuffled = source, max_share, path, shuffled
    self._seen = 0
    self._last: dict[int, int] = {}  # index -> examples seen when it was last replaced, in that order
    self.reasons: dict[int, str] = {}
    self._file = path and bucket.local(path)
    if path is not None and self._file.exists():
      self.reasons = dict(_read(self._file))

  @property
  def count(self) -> int:
    """Different examples replaced, see above."""
    return len(self._last)

  def update(self, indices: np.ndarray, replaced: np.ndarray) -> None:
    """int [b] and bool [b] of one batch.

    Raises:
      UserError: there are too many.
    """
    self._seen += len(replaced)
    for index in map(int, indices[replaced]):
      self._last.pop(index, None)
      self._last[index] = self._seen
      if index not in self.reasons:
        self._add(index)
    while self._last and next(iter(self._last.values())) <= self._seen - len(self._source):
      del self._last[next(iter(self._last))]
    self.check(self.count)

  def check(self, count: int) -> None:
    """Whether so many are too many, now.

    Raises:
      UserError: they are.
    """
    whole = len(self._source)
    seen = min(self._seen, whole)
    limit = self._share * whole
    if self._shuffled:
      limit = min(limit, self._share * seen + DEVIATIONS * math.sqrt(self._share * seen) + SPARE)
    if count > limit:
      found = [self.reasons[index] for index in self._last]
      examples = "\n  ".join(found[:5] or ["the other processes say which"])
      raise UserError(
        f"{count} of {whole if count > self.count else seen} examples could not be read (there are {whole}), too many "
        f"for data.max_bad={self._share}:\n  {examples}\n"
        f"Repair or remove them ({self._path or 'the log names them'}), or allow more"
      )

  def _add(self, index: int) -> None:
    reason = read_error(self._source, index)
    self.reasons[index] = reason
    if len(self.reasons) <= SHOWN:
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
