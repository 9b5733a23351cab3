"""`python -m beit_jax.doctor [--config=FILE[:variant]] [--workdir=DIR] [--config.key=value ...] [--json]`

Looks at a machine before a long run. One line for each thing looked at: `ok`, `warn` or `fail`, what was found and what
to do. Nothing is trained, and nothing stays behind. Exit status 0: nothing fails; 1: something does; 2: a mistake in
the command. `--json`: the same as JSON lines.

Several processes are found, or told, as by `beit_jax.main`; process 0 speaks for all.
"""

import json
import sys
from collections.abc import Iterable

from beit_jax.doctor.findings import FAIL, Line, guarded
from beit_jax.doctor.versions import versions
from beit_jax.errors import UserError

try:
  from beit_jax.doctor import host, runs
  from beit_jax.doctor.machine import prepare
  from beit_jax.doctor.processes import gather, processes, shared
  from beit_jax.runtime import distributed, logs

  BROKEN = None
except Exception as broken:  # whatever a broken installation leads to
  BROKEN = broken


def checks() -> dict:
  """What is looked at, in order: nobody may touch a device before it was asked who else does."""
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
  as_json, argv = "--json" in argv, [word for word in argv if word != "--json"]

  def say(lines: Iterable[Line]) -> list[Line]:
    lines = list(lines)
    for line in lines:
      fields = {key: value for key, value in line._asdict().items() if key != "process" or value}
      print(json.dumps(fields) if as_json else line, flush=True)
    return lines

  if BROKEN is not None:
    say(Line("versions", *found) for found in guarded(versions()))
    what = f"beit_jax cannot be imported: {type(BROKEN).__name__}: {' '.join(str(BROKEN).split())}"
    say([Line("import", FAIL, what, "pip install -e . in the environment of the run")])
    return 1
  logs.setup()
  try:
    machine = prepare(argv)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except Exception as error:  # of the config file's own code
    print(f"error: the config cannot be read: {type(error).__name__}: {error}", file=sys.stderr)
    return 2
  lines: list[Line] = []
  said = 0
  try:
    for name, check in checks().items():
      for found in guarded(check(machine)):
        lines.append(Line(name, *found))
        speaks = machine.place is None or machine.place.index == 0
        if speaks and name != "versions":  # when it is known who speaks
          said += len(say(lines[said:]))
    lines += say(gather(machine, lines))
  except KeyboardInterrupt:
    distributed.notify_peers("stopped by hand", 130)
    print("stopped", file=sys.stderr)
    return 130
  return int(any(line.status == FAIL for line in lines))


if __name__ == "__main__":
  if BROKEN is not None:
    sys.exit(main(sys.argv[1:]))
  distributed.run(main, sys.argv[1:])
