"""Limits of time and memory for each case of a fuzz test, and a summary of all cases."""

import contextlib
import gc
import resource
import signal
import time

SECONDS = 5.0  # of processor time, which does not depend on the load of the machine
WAIT = 60.0  # seconds of wall-clock time, for a case that waits without computing
GROWTH = 2**30  # bytes above the memory at the start


class TooSlow(BaseException):
  """A case took too long. A BaseException, since the code under test may catch every Exception."""


def _peak() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Limits:
  """Limits each `with limits.case(what):` block. Create it after a warm-up, in the main thread."""

  def __init__(self, name: str, seconds: float = SECONDS):
    self._name, self._seconds = name, seconds
    self.count, self._began, self._slowest = 0, time.monotonic(), (0.0, "")
    gc.collect()
    gc.freeze()  # what earlier tests have left: `case` then collects its own garbage in no time
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
      file.write("5")  # on Linux, this resets the peak that earlier tests have reached
    self._base = _peak()

  @contextlib.contextmanager
  def case(self, what: str):
    def stop(*_):
      raise TooSlow(f"{self._name}, {what}: not finished after {self._seconds:g} s")

    gc.collect()  # images in the tracebacks of the case before, which would count for this one
    timers = ((signal.SIGPROF, signal.ITIMER_PROF, self._seconds), (signal.SIGALRM, signal.ITIMER_REAL, WAIT))
    before = [signal.signal(number, stop) for number, _, _ in timers]
    began = time.process_time()
    for _, timer, seconds in timers:
      signal.setitimer(timer, seconds)
    try:
      yield
    finally:
      self.count += 1
      self._slowest = max(self._slowest, (time.process_time() - began, what))
      for (number, timer, _), handler in zip(timers, before, strict=True):
        signal.setitimer(timer, 0)
        signal.signal(number, handler)
    seconds = time.process_time() - began
    assert seconds < self._seconds, f"{self._name}, {what}: {seconds:.1f} s"
    assert self.growth < GROWTH, f"{self._name}, {what}: {self.growth / 2**20:.0f} MiB above the base"

  @property
  def growth(self) -> int:
    return _peak() - self._base

  def report(self, **counts: int) -> None:
    """Prints the summary, which `pytest -n 0 -s` shows."""
    gc.unfreeze()
    seconds, what = self._slowest
    extra = "".join(f", {count} {name}" for name, count in counts.items())
    print(
      f"\n{self._name}: {self.count} cases{extra}; {time.monotonic() - self._began:.0f} s, the slowest {seconds:.2f} s "
      f"of processor time ({what}); peak memory {self.growth / 2**20:.0f} MiB above the base"
    )
