"""The steps under way: waited for in order, logged, and counted where they were skipped."""

import collections
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from beit_jax.errors import UserError
from beit_jax.run import record
from beit_jax.runtime import bucket, sharding
from beit_jax.runtime.logs import Logger, log

SKIPPED = "skipped_step"


class Meter:
  """Takes the metrics of each step while they are still being computed.

  Attributes:
    first, last: the first and the newest logged training metrics, those of earlier sessions in the folder included.
    skipped: updates skipped so far, since the loss or the gradient was not finite.
  """

  def __init__(
    self, config: ConfigDict, logger: Logger, workdir: Path, name: str, schedules: dict[str, Any], step: int
  ):
    self._config, self._logger, self._workdir, self._name = config, logger, workdir, name
    self._rate = schedules["learning_rate"]
    self._under_way: collections.deque = collections.deque()
    self._in_a_row = 0
    self.first, self.last = record.logged(workdir)
    self.skipped = record.count(workdir, SKIPPED)
    self.restart(step)

  def restart(self, step: int) -> None:
    """Leaves what came between (an evaluation, a save) out of the speed."""
    self._clock, self._clock_step, self._waited = time.monotonic(), step, 0.0

  def next_batch(self, batches: Iterator[Any]) -> Any:
    """The next batch; the time that takes is logged as `data_wait`, a share of all time."""
    began = time.monotonic()
    batch = next(batches)
    self._waited += time.monotonic() - began
    return batch

  def enqueue(self, step: int, metrics: dict[str, jax.Array], batch: Any, wanted: bool) -> None:
    """`wanted`: that the step's metrics be logged."""
    self._under_way.append((step, metrics, batch, wanted))

  def drain(self, limit: int = 0) -> None:
    """Waits for all but the newest `limit` steps.

    Raises:
      UserError: too many skipped steps in a row; the last one's batch is in the run's folder.
    """
    while len(self._under_way) > limit:
      step, metrics, batch, wanted = self._under_way.popleft()
      loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
      if np.isfinite([loss, norm]).all():
        self._in_a_row = 0
        if wanted:
          self._log(step, metrics)
      else:
        self._skip(step, loss, norm, batch)

  def _log(self, step: int, metrics: dict[str, jax.Array]) -> None:
    row = {key: float(value) for key, value in jax.device_get(metrics).items()}
    now = time.monotonic()
    seconds = max(now - self._clock, 1e-9)
    speed = (step - self._clock_step) * self._config.batch_size / seconds
    row |= {"learning_rate": float(self._rate(step - 1)), "images_per_second": speed}
    row |= {"data_wait": min(self._waited / seconds, 1.0)}
    self.restart(step)
    self.first, self.last = self.first or row, row
    self._logger.write(step, row)
    self._logger.progress(step, row)

  def _skip(self, step: int, loss: float, norm: float, batch: Any) -> None:
    self.skipped += 1
    self._in_a_row += 1
    self._logger.write(step, {SKIPPED: 1.0})
    log.warning(
      "%s: step %d was skipped (%d so far): loss %g, gradient norm %g",
      self._name,
      step,
      self.skipped,
      loss,
      norm,
    )
    if self._in_a_row >= self._config.optimizer.max_skipped:
      process = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
      path = self._workdir / f"bad_batch_{step}{process}.npz"
      np.savez(bucket.local(path), **{key: sharding.local_part(value) for key, value in batch.items()})
      raise UserError(
        f"{self._name}: {self._in_a_row} steps in a row were not finite, the last one {step} (loss {loss:g}, gradient "
        f"norm {norm:g}); the parameters are those before them. The batch is in {path} (example_key: epoch, index). "
        "Lower optimizer.learning_rate, set optimizer.clip_norm, or allow more with optimizer.max_skipped"
      )
