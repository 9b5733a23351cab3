"""Preemption: SIGTERM (clusters, `kill`, maintenance events) and SIGINT (Ctrl-C) stop a run with everything saved.

After the first signal the loop finishes its step and saves; where there is nothing to save, and at the second signal,
the process exits at once. A SIGTERM soon after the first signal belongs to the same notice: Slurm sends two within
milliseconds. The exit status is 128 + the signal: 143 or 130.

Of several processes any one may get the signal: JAX's preemption service handles SIGTERM, and all processes agree on a
step after which they save and stop. SIGINT is forwarded to that service. A compilation or an evaluation in progress is
then finished first; only a second SIGINT exits at once.
"""

import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from beit_jax.runtime.logs import log
from beit_jax.runtime.maintenance_events import MaintenanceEvents

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_NOTICE = 5.0  # seconds after the first signal in which another SIGTERM is ignored
# JAX's service chooses the number after the last one that any process asked about. There must be one growing sequence
# for the whole process, stages included, and no other caller; Orbax's CheckpointManager, not used here, would be one.
_steps = itertools.count(1)


class Stopped(Exception):
  """The run stopped on a signal, with everything on disk.

  Attributes:
    status: the exit status, 128 + the signal.
  """

  def __init__(self, number: int):
    self.status = 128 + number
    super().__init__(f"stopped by {signal.Signals(number).name}; run the same command again to resume")


class Watch:
  """A context that records signals instead of letting them end the process.

  A thread listens, since Python's own handlers wait until a compilation returns, which can take minutes. Outside the
  main thread (a notebook's worker) nothing is installed.

  Attributes:
    nothing_to_save: whether everything worth keeping is on disk; the training loop sets it.
  """

  def __init__(self) -> None:
    self.nothing_to_save = True
    self._number, self._lock = 0, threading.Lock()
    self._first_at = 0.0  # time of the first signal
    self._several, self._events = jax.process_count() > 1, MaintenanceEvents()
    self._agreed = not self._several  # all processes stop after the current step
    self._old: dict[int, Any] = {}

  def __enter__(self) -> "Watch":
    if threading.current_thread() is threading.main_thread():
      self._reader, self._writer = socket.socketpair()
      self._writer.setblocking(False)
      numbers = SIGNALS[1:] if self._several else SIGNALS
      self._old = {number: signal.signal(number, lambda *_: None) for number in numbers}
      self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
      self._thread = threading.Thread(target=self._listen, daemon=True)
      self._thread.start()
      self._events.__enter__()
    return self

  def __exit__(self, *_: object) -> None:
    if self._old:
      self._events.__exit__()
      signal.set_wakeup_fd(self._old_fd)
      for number, handler in self._old.items():
        signal.signal(number, handler)
      self._writer.close()
      self._thread.join()
      self._reader.close()
      self._old = {}

  def _listen(self) -> None:
    while data := self._reader.recv(1):
      number = data[0]
      if number not in self._old:
        continue
      name = signal.Signals(number).name
      with self._lock:
        if self._number:
          if number == signal.SIGTERM and time.monotonic() < self._first_at + SAME_NOTICE:
            continue
          self._exit(number, f"second {name}")
        if self.nothing_to_save and not self._several:
          self._exit(number, f"{name}, and nothing to save")
        self._number, self._first_at = number, time.monotonic()
      if self._several:
        os.kill(os.getpid(), signal.SIGTERM)
      log.warning("%s: finishing the step and saving; a second signal exits at once", name)

  def _exit(self, number: int, reason: str) -> None:
    log.warning("%s: exiting at once; run the same command again to resume", reason)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(128 + number)

  def requested(self) -> int:
    """The signal after which to stop after this step, the same decision on all processes; 0 for none.

    To be called once after each step.
    """
    if self._several and multihost_utils.reached_preemption_sync_point(next(_steps)):
      self._agreed, self._number = True, self._number or signal.SIGTERM
    return self._number if self._agreed else 0

  def saved(self) -> None:
    """To be called when everything is on disk.

    Raises:
      Stopped: a signal has arrived.
    """
    with self._lock:
      self.nothing_to_save = True
    if self._number and self._agreed:
      raise Stopped(self._number)
