"""The state of the best evaluation of a run, in workdir/best."""

from pathlib import Path

import numpy as np

from beit_jax.run import checkpoint
from beit_jax.run.state import TrainState
from beit_jax.runtime.logs import log


class Best:
  """Keeps the state of the best evaluation in workdir/best; `metric` "" keeps none."""

  def __init__(self, workdir: Path, metric: str, fresh: bool):
    """`fresh`: the run begins; what a run before it has left here is put aside."""
    self._metric, self._saver = metric, None
    if metric:
      # Of two the older one is there until the new one is sealed.
      self._saver = checkpoint.Checkpointer(workdir / "best", keep=2, required=False, fresh=fresh)
      latest, before = self._saver.latest(), {}
      if latest is not None:
        before = checkpoint.read_description(self._saver.root / str(latest)).get("best", {})
      self._value = before.get("value") if before.get("metric") == metric else None

  def offer(self, step: int, metrics: dict[str, float], state: TrainState, description: dict) -> None:
    if self._saver is None or not np.isfinite(metrics[self._metric]):
      return
    value, lower = metrics[self._metric], self._metric.endswith(("loss", "mae", "mse"))
    if self._value is None or (value < self._value if lower else value > self._value):
      self._value = value
      best = {"metric": self._metric, "value": value}
      self._saver.delete_from(step)
      self._saver.save_and_wait(step, state, {**description, "best": best})
      log.info("best so far: %s %.6g at step %d, kept in %s", self._metric, value, step, self._saver.root)

  def close(self) -> None:
    if self._saver is not None:
      self._saver.close()
