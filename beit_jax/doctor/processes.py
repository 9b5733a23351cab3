"""Several processes: all there, with the same software and the same config; their findings in one report."""

import contextlib
import json
import platform
from typing import Any

import beit_jax
from beit_jax.doctor.findings import FAIL, OK, Found, Line, unless_worse
from beit_jax.doctor.host import trial
from beit_jax.doctor.machine import Machine
from beit_jax.run import record
from beit_jax.runtime import distributed
from beit_jax.runtime.logs import log

SHOWN = 4  # differences of a process
PATIENCE = 900  # seconds for the others to look at their own machines


def _store() -> Any:
  from jax._src import distributed as jax_distributed  # there is no public way to it; Orbax goes the same

  return jax_distributed.global_state.client


def _post(machine: Machine, what: str, value: Any) -> None:
  _store().key_value_set(f"doctor/{what}/{machine.place.index}", json.dumps(value))


def _fetch(what: str, index: int, seconds: int) -> Any:
  return json.loads(_store().blocking_key_value_get(f"doctor/{what}/{index}", seconds * 1000))


def identity(machine: Machine) -> dict[str, str]:
  """All that must be the same everywhere: versions, and every key of the config."""

  def leaves(tree, prefix):
    for key, value in tree.items():
      yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, str(value))]

  same = {"beit_jax": beit_jax.__version__, "python": platform.python_version()}
  same |= {name: record.version(name) for name in record.PACKAGES}
  same |= {"--workdir": str(machine.workdir)}
  for run in machine.runs:
    same |= leaves(run.config.to_dict(), f"{run.name}." if run.name else "")
  return same


def differences(mine: dict[str, str], theirs: dict[str, str]) -> str:
  """`key theirs (here mine), ...`, or "" where there are none."""
  names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
  text = ", ".join(f"{name} {theirs.get(name)!r} (here {mine.get(name)!r})" for name in names[:SHOWN])
  return text + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@unless_worse
def processes(machine: Machine) -> Found:
  try:
    machine.place = distributed.initialize(machine.flags)
  except Exception:
    machine.apart = True
    raise
  finally:
    log.setLevel("WARNING")
  if machine.place is None:
    yield OK, "this one alone", ""
    return
  mine = {"host": platform.node(), "same": identity(machine)}
  _post(machine, "identity", mine)
  hosts = [mine["host"]]
  for index in range(1, machine.place.count) if machine.place.index == 0 else ():
    other = _fetch("identity", index, 120)
    hosts.append(other["host"])
    if text := differences(mine["same"], other["same"]):
      advice = "install the same versions everywhere, and start every process with the same command and files"
      yield FAIL, f"process {index} ({other['host']}) is not as process 0: {text}", advice
  yield OK, f"{machine.place.count} are here: {', '.join(hosts)}", ""


@unless_worse
def shared(machine: Machine) -> Found:
  """Whether all see the same workdir; nothing is said of one process."""
  if machine.place is None:
    return
  if machine.place.index:
    name = _fetch("trial", 0, 120)
    _post(machine, "seen", not name or (machine.ground() / name).exists())
    return
  try:
    with trial(machine.ground()) as path:
      _post(machine, "trial", path.name)
      blind = [index for index in range(1, machine.place.count) if not _fetch("seen", index, 120)]
  except OSError:  # as the check of the workdir says
    _post(machine, "trial", "")
    return
  for index in blind:
    what = f"process {index} does not see a file that process 0 wrote in {machine.ground()}"
    yield FAIL, what, "all need the same --workdir, on a file system that they share"
  yield OK, f"all see {machine.ground()}", ""


def gather(machine: Machine, lines: list[Line]) -> list[Line]:
  """Hands this process's warnings and failures to process 0, and returns there those of all the others."""
  if machine.place is None or machine.apart:
    return []
  if machine.place.index:
    bad = [line for line in lines if line.status != OK]
    with contextlib.suppress(Exception):  # process 0 notices that nothing comes
      _post(machine, "lines", [line._replace(process=str(machine.place)) for line in bad])
    return []
  found: dict[Line, list[str]] = {}
  for index in range(1, machine.place.count):
    try:
      for line in (Line(*line) for line in _fetch("lines", index, PATIENCE)):
        found.setdefault(line._replace(process=""), []).append(line.process)
    except Exception as error:
      text = f"process {index} does not say what it found: {' '.join(str(error).split())[:200]}"
      found[Line("processes", FAIL, text, "look at its own log")] = [""]
  more = lambda names: f"{names[0]} and {len(names) - 1} others" if len(names) > 1 else names[0]
  return [line._replace(process=more(names)) for line, names in found.items()]
