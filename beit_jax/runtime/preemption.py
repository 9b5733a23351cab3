"""Being asked to stop: SIGTERM (clusters, `kill`, notices of clouds) and SIGINT (Ctrl-C).

The first signal lets the loop finish its step and save; where there is nothing to save, and at the second, the process
leaves at once. The exit status is 128 + the signal: 143 or 130.

Of several processes any one may be asked: JAX's own service takes SIGTERM, and all agree on a step after which they
save and stop. SIGINT is handed on to it. A compilation or an evaluation under way is not interrupted then;
only a second SIGINT leaves at once.
"""

import itertools
import logging
import os
import signal
import socket
import sys
import threading

import jax
from jax.experimental import multihost_utils

from beit_jax.runtime.logs import log
from beit_jax.runtime.maintenance_events import Notices

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_steps = itertools.count(1)  # of all stages together: a notice in the last evaluation of one ends the next


class Stopped(Exception):
  """The run stopped on a signal, with everything on disk.

  Attributes:
    status: the exit status that says so, 128 + the signal.
  """

  def __init__(self, number: int):
    self.status = 128 + number
    super().__init__(f"stopped by {signal.Signals(number).name}; give the same command again to go on")


class Watch:
  """A context that notes signals instead of dying of them.

  A thread listens, since Python's own handlers wait until a compilation, which can take minutes, returns. Outside
  the main thread (a notebook's worker) nothing is installed.

  Attributes:
    nothing_to_save: whether everything worth keeping is on disk; the loop sets it.
  """

  def __init__(self):
    self.nothing_to_save = True
    self._number, self._lock = 0, threading.Lock()
    self._several, self._notices = jax.process_count() > 1, Notices()
    self._agreed = not self._several  # that all processes stop now
    self._old: dict[int, object] = {}

  def __enter__(self) -> "Watch":
    if threading.current_thread() is threading.main_thread():
      self._reader, self._writer = socket.socketpair()
      self._writer.setblocking(False)
      mine = SIGNALS[1:] if self._several else SIGNALS
      self._old = {number: signal.signal(number, lambda *_: None) for number in mine}
      self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
      self._thread = threading.Thread(target=self._listen, daemon=True)
      self._thread.start()
      self._notices.__enter__()
    return self

  def __exit__(self, *_) -> None:
    if self._old:
      self._notices.__exit__()
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
      with self._lock:
        if self._number or (self.nothing_to_save and not self._several):
          self._leave(number)
        self._number = number
      if self._several:
        os.kill(os.getpid(), signal.SIGTERM)
      log.warning(
        "%s: finishing the step and saving; a second signal leaves at once", signal.Signals(number).name
      )

  def _leave(self, number: int) -> None:
    again = "again" if self._number else "and nothing to save"
    name = signal.Signals(number).name
    log.warning("%s %s: leaving at once; give the same command again to go on", name, again)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(128 + number)

  def requested(self) -> int:
    """The signal on which to stop after this step, on all processes or on none; 0 for none. Asked once a step."""
    if self._several and multihost_utils.reached_preemption_sync_point(next(_steps)):
      self._agreed, self._number = True, self._number or signal.SIGTERM
    return self._number if self._agreed else 0

  def saved(self) -> None:
    """To be called when everything is on disk.

    Raises:
      Stopped: a signal has come.
    """
    with self._lock:
      self.nothing_to_save = True
    if self._number and self._agreed:
      raise Stopped(self._number)
