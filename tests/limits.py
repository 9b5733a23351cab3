"""Time and memory of the cases of a fuzz test: a limit for each, and figures about all."""

import contextlib
import resource
import signal
import time

SECONDS, WAIT = 5.0, 60.0  # of the processor, on however busy a machine; on the clock, for one that waits
GROWTH = 2**30  # bytes


class TooSlow(BaseException):
  """Not an Exception: code under test may catch all of these."""


def _peak() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Limits:
  """`with limits.case(what):` around each case, in the main thread; made after a warm-up."""

  def __init__(self, name: str, seconds: float = SECONDS):
    self._name, self._seconds = name, seconds
    self.count, self._began, self._slowest = 0, time.monotonic(), (0.0, "")
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
      file.write("5")  # on Linux: the peak of earlier tests is forgotten
    self._base = _peak()

  @contextlib.contextmanager
  def case(self, what: str):
    def late(*_):
      raise TooSlow(f"{self._name}, {what}: no end after {self._seconds:g} s")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, self._seconds), (signal.SIGALRM, signal.ITIMER_REAL, WAIT))
    before = [signal.signal(number, late) for number, _, _ in timers]
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
    """Prints the figures (`pytest -n 0 -s` shows them)."""
    seconds, what = self._slowest
    more = "".join(f", {count} {name}" for name, count in counts.items())
    print(
      f"\n{self._name}: {self.count} cases{more}; {time.monotonic() - self._began:.0f} s, the slowest {seconds:.2f} s "
      f"of the processor ({what}); peak of memory {self.growth / 2**20:.0f} MiB above the base"
    )
