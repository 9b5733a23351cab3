"""Children that are timed in turns: a process of its own for each side, one round at a time while the other sleeps.

A child calls `serve`; the parent makes a `Child` of its command and calls it. They speak JSON lines: {"steps": n} is
answered with the times that n steps took, {"ask": name} with whatever the child has under that name. Linux only.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Times(NamedTuple):
  """Of one round, in seconds; `cpu` over all threads, `others`: cores that the rest of the machine kept busy."""

  wall: float
  cpu: float
  others: float


def busy() -> float:
  """CPU seconds that the whole machine has worked since it was started."""
  user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
  return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def peak_rss() -> float:
  """GiB of this process at its largest."""
  line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
  return int(line.split()[1]) / 2**20


def serve(run: Callable[[int], Any], **answers: Callable[[], Any]) -> None:
  """`run(n)` makes n steps and returns when they are done."""
  replies = sys.stdout
  sys.stdout = sys.stderr  # whatever a library prints is no answer
  print(json.dumps("ready"), file=replies, flush=True)
  for line in sys.stdin:
    message = json.loads(line)
    if "ask" in message:
      answer = answers[message["ask"]]()
    else:
      began = time.perf_counter(), time.process_time(), busy()
      run(message["steps"])
      wall, cpu, all_work = (
        now - then
        for now, then in zip((time.perf_counter(), time.process_time(), busy()), began, strict=True)
      )
      answer = wall, cpu, max(all_work - cpu, 0.0) / wall
    print(json.dumps(answer), file=replies, flush=True)


class Child:
  """A process that runs `serve`."""

  def __init__(self, script: str, **options: Any):
    """`options` become --name=value of `benchmarks/script`."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(Path(__file__).with_name(script)), *flags]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self._read()

  def _read(self):
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f"{self._process.args} ended with status {self._process.wait()}")
    return json.loads(line)

  def _say(self, message):
    self._process.stdin.write(json.dumps(message) + "\n")
    self._process.stdin.flush()
    return self._read()

  def steps(self, count: int) -> Times:
    """The times of `count` steps together."""
    return Times(*self._say({"steps": count}))

  def ask(self, name: str) -> Any:
    return self._say({"ask": name})

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()
