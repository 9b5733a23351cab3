"""Times programs in alternating rounds: each runs in its own process and sleeps while the other one is timed.

A child process calls `serve`; the parent starts it as a `Child`. They exchange JSON lines: the child answers
{"steps": n} with the times of n steps and {"ask": name} with the value of that name. Linux only.
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
  """The times of one round.

  Attributes:
    wall: seconds.
    cpu: CPU seconds of all threads.
    others: number of cores that other processes kept busy on average.
  """

  wall: float
  cpu: float
  others: float


def machine_cpu_seconds() -> float:
  """Returns the CPU seconds of all processes since the machine was started."""
  user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
  return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def peak_rss() -> float:
  """Returns the peak memory of this process in GiB."""
  line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
  return int(line.split()[1]) / 2**20


def serve(run: Callable[[int], Any], **answers: Callable[[], Any]) -> None:
  """Answers the parent until it closes the pipe.

  Args:
    run: `run(n)` makes n steps and returns when they are done.
    **answers: functions that compute the answers to `Child.ask`.
  """
  replies = sys.stdout
  sys.stdout = sys.stderr  # keeps what libraries print out of the answers
  print(json.dumps("ready"), file=replies, flush=True)
  for line in sys.stdin:
    message = json.loads(line)
    if "ask" in message:
      answer = answers[message["ask"]]()
    else:
      began = _clocks()
      run(message["steps"])
      wall, cpu, machine_cpu = (now - then for now, then in zip(_clocks(), began, strict=True))
      answer = wall, cpu, max(machine_cpu - cpu, 0.0) / wall
    print(json.dumps(answer), file=replies, flush=True)


def _clocks() -> tuple[float, float, float]:
  return time.perf_counter(), time.process_time(), machine_cpu_seconds()


class Child:
  """A process that runs `serve`.

  Args:
    script: file name in `benchmarks`.
    **options: its flags, --name=value.
  """

  def __init__(self, script: str, **options: Any):
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(Path(__file__).with_name(script)), *flags]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self._read()

  def _read(self) -> Any:
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f"{self._process.args} ended with status {self._process.wait()}")
    return json.loads(line)

  def _request(self, message: dict[str, Any]) -> Any:
    self._process.stdin.write(json.dumps(message) + "\n")
    self._process.stdin.flush()
    return self._read()

  def steps(self, count: int) -> Times:
    """Runs `count` steps and returns their times together."""
    return Times(*self._request({"steps": count}))

  def ask(self, name: str) -> Any:
    """Returns one of the child's `answers`."""
    return self._request({"ask": name})

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()
