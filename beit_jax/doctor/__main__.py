"""Checks a machine before a long run.

    python -m beit_jax.doctor [--config=FILE[:variant]] [--workdir=DIR] [--config.key=value ...] [--json]

Prints one line for each thing that it checks: `ok`, `warn` or `fail`, what it found, and what to do. It trains nothing
and leaves nothing behind. `--json` prints JSON lines.

Exit status 0: nothing fails; 1: something does; 2: the command is wrong.

Several processes find each other as those of `beit_jax.main` do; process 0 reports for all.
"""

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from beit_jax.doctor.findings import FAIL, Found, Line, guarded
from beit_jax.doctor.versions import versions
from beit_jax.errors import UserError
from beit_jax.runtime.flags import print_help

BROKEN: Exception | None = None
try:
  from beit_jax.doctor import host, runs
  from beit_jax.doctor.machine import Machine, prepare
  from beit_jax.doctor.processes import gather, processes, shared
  from beit_jax.runtime import distributed, logs
except Exception as error:  # a broken installation can raise anything
  BROKEN = error


def checks() -> dict[str, Callable[[Any], Found]]:
  """Returns all checks in order; those of who uses a device come before the first use of one."""
  return {
    "versions": versions,
    "processes": processes,
    "tpu lock": host.tpu_lock,
    "gpu memory": host.gpu_memory,
    "devices": host.devices,
    "workdir": host.workdir,
    "shared": shared,
    "clock": host.clock,
    "locks": runs.locks,
    "data": runs.data,
    "sizes": runs.sizes,
    "checkpoints": runs.checkpoints,
    "space": runs.space,
  }


def main(argv: list[str]) -> int:
  if print_help(argv, __doc__):
    return 0
  as_json, argv = "--json" in argv, [word for word in argv if word != "--json"]
  if BROKEN is not None:
    _print((Line("versions", *found) for found in guarded(versions())), as_json)
    what = f"beit_jax cannot be imported: {type(BROKEN).__name__}: {' '.join(str(BROKEN).split())}"
    _print([Line("import", FAIL, what, "pip install -e . in the environment of the run")], as_json)
    return 1
  logs.setup()
  try:
    machine = prepare(argv)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  try:
    lines = _check(machine, as_json)
  except KeyboardInterrupt:
    distributed.notify_peers("stopped by hand", 130)
    print("stopped", file=sys.stderr)
    return 130
  return int(any(line.status == FAIL for line in lines))


def _check(machine: "Machine", as_json: bool) -> list[Line]:
  """Makes all checks; prints each line as soon as it is known that this process reports."""
  lines: list[Line] = []
  printed = 0
  for name, check in checks().items():
    for found in guarded(check(machine)):
      if found[0] == FAIL and any(found == (line.status, line.found, line.advice) for line in lines):
        continue  # an earlier check has met the same error
      lines.append(Line(name, *found))
      if name != "versions" and (machine.process is None or machine.process.index == 0):
        _print(lines[printed:], as_json)
        printed = len(lines)
  others = gather(machine, lines)
  _print(others, as_json)
  return lines + others


def _print(lines: Iterable[Line], as_json: bool) -> None:
  for line in lines:
    fields = {key: value for key, value in line._asdict().items() if key != "process" or value}
    print(json.dumps(fields) if as_json else line, flush=True)


if __name__ == "__main__":
  if BROKEN is not None:
    sys.exit(main(sys.argv[1:]))
  distributed.run(main, sys.argv[1:])
