"""The steps in flight: waited for in order, logged, and counted if their update was skipped."""

import collections
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from beit_jax.errors import UserError
from beit_jax.run import record
from beit_jax.run.metric_writer import MetricWriter
from beit_jax.run.progress import Progress
from beit_jax.runtime import bucket, sharding
from beit_jax.runtime.logs import log

SKIPPED = "skipped_step"


class Step(NamedTuple):
  """A step that was dispatched and may still be running on the devices."""

  number: int
  metrics: dict[str, jax.Array]
  batch: dict[str, jax.Array]
  wanted: bool  # whether its metrics are logged


class Meter:
  """Takes the metrics of each step while the devices still compute them, and logs them later.

  Attributes:
    first, last: the first and the newest row of training metrics, earlier sessions included.
    skipped: updates skipped so far, because the loss or the gradient was not finite.
  """

  def __init__(
    self,
    config: ConfigDict,
    logger: MetricWriter,
    progress: Progress,
    workdir: Path,
    name: str,
    schedules: dict[str, Callable[[int], Any]],
    step: int,
  ):
    """`name`: the run in messages; `schedules`: functions of the step; `step`: where this session starts."""
    self._config, self._logger, self._workdir, self._name = config, logger, workdir, name
    self._progress, self._schedules = progress, schedules
    self._in_flight: collections.deque[Step] = collections.deque()
    self._skipped_in_a_row = 0
    self.first, self.last = record.first_and_last(workdir)
    self.skipped = record.count(workdir, SKIPPED)
    self.restart(step)

  def restart(self, step: int) -> None:
    """Starts a new interval for the speed, so that an evaluation or a save does not count."""
    self._start_time, self._start_step, self._data_wait = time.monotonic(), step, 0.0

  def next_batch(self, batches: Iterator[Any]) -> Any:
    """Returns the next batch; the fraction of time spent waiting for it is logged as `data_wait`."""
    began = time.monotonic()
    batch = next(batches)
    self._data_wait += time.monotonic() - began
    return batch

  def enqueue(self, step: int, metrics: dict[str, jax.Array], batch: Any, wanted: bool) -> None:
    """Adds a step that was dispatched; `wanted`: whether its metrics are logged."""
    self._in_flight.append(Step(step, metrics, batch, wanted))

  def drain(self, max_in_flight: int = 0) -> None:
    """Waits for all but the newest `max_in_flight` steps.

    Raises:
      UserError: Too many steps in a row were skipped. The batch of the last one is written to the workdir.
    """
    while len(self._in_flight) > max_in_flight:
      step = self._in_flight.popleft()
      loss, norm = float(step.metrics["loss"]), float(step.metrics["grad_norm"])
      self._progress.completed(step.number)
      if not np.isfinite([loss, norm]).all():
        self._skip(step, loss, norm)
        continue
      self._skipped_in_a_row = 0
      if step.wanted:
        self._log(step)

  def _log(self, step: Step) -> None:
    row = {key: float(value) for key, value in jax.device_get(step.metrics).items()}
    seconds = max(time.monotonic() - self._start_time, 1e-9)
    row |= {key: float(schedule(step.number - 1)) for key, schedule in self._schedules.items()}
    row["images_per_second"] = (step.number - self._start_step) * self._config.batch_size / seconds
    row["data_wait"] = min(self._data_wait / seconds, 1.0)
    self.restart(step.number)
    self.first, self.last = self.first or row, row
    self._logger.write(step.number, row)
    self._progress.show(step.number, row)

  def _skip(self, step: Step, loss: float, norm: float) -> None:
    self.skipped += 1
    self._skipped_in_a_row += 1
    self._logger.write(step.number, {SKIPPED: 1.0})
    text = "%s: the update of step %d was skipped (%d so far): loss %g, gradient norm %g"
    log.warning(text, self._name, step.number, self.skipped, loss, norm)
    if self._skipped_in_a_row >= self._config.optimizer.max_skipped:
      process = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
      path = self._workdir / f"bad_batch_{step.number}{process}.npz"
      arrays: dict[str, Any] = {key: sharding.local_part(value) for key, value in step.batch.items()}
      np.savez(bucket.local(path), **arrays)
      raise UserError(
        f"{self._name}: {self._skipped_in_a_row} steps in a row were not finite, the last one is step {step.number} "
        f"(loss {loss:g}, gradient norm {norm:g}). Their updates were skipped. The last batch is in {path} "
        "(example_key: epoch, index). Lower optimizer.learning_rate, set optimizer.clip_norm, or raise "
        "optimizer.max_skipped"
      )
