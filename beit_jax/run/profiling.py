"""A profile of some steps, for TensorBoard's profiler, XProf or Perfetto."""

from pathlib import Path
from typing import Any

import jax

from beit_jax.runtime import bucket
from beit_jax.runtime.logs import log


class Trace:
  """`jax.profiler` around steps first..last, both included; process 0 writes what its devices and its host did."""

  def __init__(self, steps: tuple[int, ...], folder: Path, total_steps: int):
    """`steps`: (first, last), or () for no trace."""
    self._first, self._last = steps or (0, 0)
    self._folder, self._running = folder, False
    if self._first > total_steps:
      log.warning("config key 'profile_steps': the run has %d steps, none of %s", total_steps, steps)

  def before(self, step: int, state: Any) -> None:
    """Before a step's batch is asked for; `state`: what the step will work on."""
    if step == self._first and jax.process_index() == 0:
      jax.block_until_ready(state)  # or the steps under way would be in it
      try:
        jax.profiler.start_trace(bucket.local(self._folder))
        self._running = True
      except Exception as error:  # a run does not end for want of a profile
        log.warning("no profile in %s: %s", self._folder, error)

  def after(self, step: int, state: Any) -> None:
    """After the step was begun; `state`: its result."""
    if step == self._last and self._running:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    if self._running:
      self._running = False
      try:
        jax.profiler.stop_trace()
        log.info("profile: %s", self._folder)
      except Exception as error:  # a full disk, mostly
        log.warning("no profile in %s: %s", self._folder, error)
