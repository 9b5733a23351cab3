"""The state of the best evaluation of a run, in `workdir/best`."""

from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.run import checkpoint
from beit_jax.run.checkpointer import Checkpointer
from beit_jax.run.state import TrainState
from beit_jax.runtime.logs import log

LOWER_IS_BETTER = ("loss", "mae", "mse")  # ends of metric names


class Best:
  """Keeps the state with the best value of one evaluation metric; an empty `metric` keeps none."""

  def __init__(self, workdir: Path, metric: str, fresh: bool):
    """`fresh`: whether the run has just begun; the best state of an earlier run is then moved away."""
    self._metric = metric
    self._saver: Checkpointer | None = None
    self._value: float | None = None
    if metric:
      # Two are kept, so that the older one exists until the newer one is sealed.
      self._saver = Checkpointer(workdir / "best", keep=2, required=False, fresh=fresh)
      latest = self._saver.latest()
      if latest is not None:
        best = checkpoint.read_description(self._saver.root / str(latest)).get("best", {})
        self._value = best.get("value") if best.get("metric") == metric else None

  def offer(
    self, step: int, metrics: dict[str, float], state: TrainState, description: dict[str, Any]
  ) -> None:
    """Saves `state` and waits for it if its metric is better than all before."""
    if self._saver is None or not self._improves(metrics[self._metric]):
      return
    self._value = metrics[self._metric]
    best = {"metric": self._metric, "value": self._value}
    self._saver.delete_from(step)
    self._saver.save_and_wait(step, state, {**description, "best": best})
    log.info("best so far: %s %.6g at step %d, kept in %s", self._metric, self._value, step, self._saver.root)

  def _improves(self, value: float) -> bool:
    if not np.isfinite(value):
      return False
    if self._value is None:
      return True
    return value < self._value if self._metric.endswith(LOWER_IS_BETTER) else value > self._value

  def close(self) -> None:
    if self._saver is not None:
      self._saver.close()
