"""Settings that take less memory, in the order in which they cost speed or change least."""

import itertools
from collections.abc import Iterator
from typing import Any

Setting = dict[str, Any]  # dotted config key of the stage -> value
ROOM = 0.9  # of the memory, which the state alone may take for a setting to be tried


def settings(found: dict[str, Any], hbm: float) -> Iterator[Setting]:
  """What to try after a setting that does not fit, never making the effective batch another one.

  Rematerialisation, then with layer scan, then with the state spread over 2, 4, ... devices, then with the batch in
  parts. Where the state alone would not fit it is not worth compiling.
  """
  model, fsdp, parts = found["model"], found["mesh"]["fsdp"], found["microbatches"]
  num_devices = found["mesh"]["data"] * fsdp
  start: Setting = {}
  has_blocks = model.get("remat") is not None
  ladder: list[Setting] = []
  if has_blocks and not model["remat"]:
    start = start | {"model.remat": True}
    ladder.append(start)
  if has_blocks and not model["scan"]:
    start = start | {"model.scan": True}
    ladder.append(start)
  for power in itertools.count(1):
    wider = fsdp * 2**power
    if wider > num_devices or num_devices % wider:
      break
    fixed = {} if found["mesh_data"] == -1 else {"mesh.data": num_devices // wider}
    ladder.append(start | {"mesh.fsdp": wider} | fixed)
  last = ladder[-1] if ladder else start
  most = found["batch_size"] // num_devices
  ladder += [last | {"microbatches": parts * 2**n} for n in range(1, 6) if most % (parts * 2**n) == 0]
  for setting in ladder:
    if found["state_bytes"] / setting.get("mesh.fsdp", fsdp) < ROOM * hbm:
      yield setting


def flags(stage: str, setting: Setting) -> list[str]:
  """As they are written on the command line."""
  return [f"--config.{stage + '.' if stage else ''}{key}={value}" for key, value in setting.items()]
