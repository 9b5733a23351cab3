"""A profile of some training steps, for TensorBoard, XProf or Perfetto."""

from pathlib import Path
from typing import Any

import jax

from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log


class Trace:
  """Runs `jax.profiler` around a range of steps on process 0. A profile that fails never stops the run."""

  def __init__(self, steps: tuple[int, ...], folder: Path, total_steps: int):
    """`steps`: (first, last), both included, or () for no profile."""
    self._first, self._last = steps or (0, 0)
    self._folder, self._running = folder, False
    if self._first > total_steps:
      log.warning("config key 'profile_steps': the run has %d steps, none of %s", total_steps, steps)

  def before(self, step: int, state: Any) -> None:
    """Call before the batch of a step is requested, with the state that the step starts from."""
    if step == self._first and jax.process_index() == 0:
      jax.block_until_ready(state)  # Otherwise earlier steps that are in flight would be in the profile.
      try:
        jax.profiler.start_trace(bucket.local(self._folder))
        self._running = True
      except Exception as error:  # The profiler raises errors of many types.
        log.warning("no profile in %s: %s", self._folder, error)

  def after(self, step: int, state: Any) -> None:
    """Call after a step was dispatched, with the state that it returned."""
    if step == self._last and self._running:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    if self._running:
      self._running = False
      try:
        jax.profiler.stop_trace()
        log.info("profile: %s", self._folder)
      except Exception as error:  # Most likely a full disk.
        log.warning("no profile in %s: %s", self._folder, error)
