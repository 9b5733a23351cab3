"""Checks of several processes: all are there, with the same software and config; process 0 reports for all."""

import contextlib
import platform
from typing import Any

import beit_jax
from beit_jax.doctor.findings import FAIL, OK, Found, Line, unless_worse
from beit_jax.doctor.host import trial_file
from beit_jax.doctor.machine import Machine
from beit_jax.run import record
from beit_jax.runtime import bucket, distributed
from beit_jax.runtime.logs import log

ANSWER_SECONDS = 120
CHECK_SECONDS = 900  # for the other processes to check their own machines


def _post(index: int, what: str, value: Any) -> None:
  distributed.post(f"doctor/{what}/{index}", value)


def _fetch(what: str, index: int, seconds: int = ANSWER_SECONDS) -> Any:
  return distributed.fetch(f"doctor/{what}/{index}", seconds)


def identity(machine: Machine) -> dict[str, str]:
  """Returns all that must be the same in every process: versions, and every key of the config."""
  same = {"beit_jax": beit_jax.__version__, "python": platform.python_version()}
  same |= {name: record.version(name) for name in record.PACKAGES}
  same |= {"--workdir": str(machine.workdir)}
  for run in machine.runs:
    keys = record.flatten_config(run.config.to_dict())
    same |= {f"{run.name}.{key}".lstrip("."): str(value) for key, value in keys.items()}
  return same


@unless_worse
def processes(machine: Machine) -> Found:
  try:
    machine.process = distributed.initialize(machine.flags)
  except Exception:
    machine.disconnected = True
    raise
  finally:
    log.setLevel("WARNING")
  if machine.process is None:
    yield OK, "a single process", ""
    return
  mine, hosts = identity(machine), [platform.node()]
  _post(machine.process.index, "identity", (platform.node(), mine))
  for index in range(1, machine.process.count) if machine.process.index == 0 else ():
    host, theirs = _fetch("identity", index)
    hosts.append(host)
    if text := distributed.differences(mine, theirs):
      advice = "install the same versions everywhere, and start every process with the same command and files"
      yield FAIL, f"process {index} ({host}) differs from process 0: {text}", advice
  yield OK, f"{machine.process.count} are connected: {', '.join(hosts)}", ""


@unless_worse
def shared(machine: Machine) -> Found:
  """Checks that all processes see the same workdir."""
  if machine.process is None or bucket.remote(machine.workdir):
    return
  if machine.process.index:
    name = _fetch("trial", 0)
    _post(machine.process.index, "seen", not name or (machine.ground() / name).exists())
    return
  try:
    with trial_file(machine.ground()) as path:
      _post(machine.process.index, "trial", path.name)
      blind = [index for index in range(1, machine.process.count) if not _fetch("seen", index)]
  except OSError:  # the check of the workdir reports it
    _post(machine.process.index, "trial", "")
    return
  for index in blind:
    what = f"process {index} does not see a file that process 0 wrote in {machine.ground()}"
    yield FAIL, what, "all need the same --workdir, on a file system that they share"
  yield OK, f"all see {machine.ground()}", ""


def gather(machine: Machine, lines: list[Line]) -> list[Line]:
  """Sends this process's warnings and failures to process 0, and returns there those of all others."""
  if machine.process is None or machine.disconnected:
    return []
  if machine.process.index:
    bad = [line._replace(process=str(machine.process)) for line in lines if line.status != OK]
    with contextlib.suppress(Exception):  # process 0 reports that nothing arrives
      _post(machine.process.index, "lines", bad)
    return []
  found: dict[Line, list[str]] = {}
  for index in range(1, machine.process.count):
    try:
      for line in (Line(*fields) for fields in _fetch("lines", index, CHECK_SECONDS)):
        found.setdefault(line._replace(process=""), []).append(line.process)
    except Exception as error:
      text = f"process {index} did not report: {' '.join(str(error).split())[:200]}"
      found[Line("processes", FAIL, text, "look at its own log")] = [""]
  return [
    line._replace(process=first + (f" and {len(others)} others" if others else ""))
    for line, (first, *others) in found.items()
  ]
