"""Settings that need less memory, in the order in which to try them: the cheapest in speed first."""

import itertools
from collections.abc import Iterator
from typing import Any

Setting = dict[str, Any]  # dotted config key of the stage -> value
MAX_STATE = (
  0.9  # the share of the memory that the state and gradients may take for a setting to be worth compiling
)


def settings(found: dict[str, Any], memory: float) -> Iterator[Setting]:
  """Yields what to try after a setting that does not fit; the effective batch stays the same.

  Rematerialization first, then a scan over the layers too, then also the state sharded over 2, 4, ... devices, and last
  the batch in microbatches.

  Args:
    found: a result of `compile.compile_step`.
    memory: bytes of one device.
  """
  model, fsdp, microbatches = found["model"], found["mesh"]["fsdp"], found["microbatches"]
  num_devices = found["mesh"]["data"] * fsdp
  setting: Setting = {}
  ladder: list[Setting] = []
  for key in ("remat", "scan"):
    if model.get(key) is False:  # a model without blocks has no such key
      setting = setting | {f"model.{key}": True}
      ladder.append(setting)
  for power in itertools.count(1):
    wider = fsdp * 2**power
    if num_devices % wider:
      break
    fixed = {} if found["mesh_data"] == -1 else {"mesh.data": num_devices // wider}
    ladder.append(setting | {"mesh.fsdp": wider} | fixed)
  setting = ladder[-1] if ladder else {}
  rows = found["batch_size"] // num_devices
  more = [microbatches * 2**power for power in range(1, 6)]
  ladder += [setting | {"microbatches": parts} for parts in more if rows % parts == 0]
  for setting in ladder:
    if found["state_bytes"] / setting.get("mesh.fsdp", fsdp) < MAX_STATE * memory:
      yield setting


def flags(stage: str, setting: Setting) -> list[str]:
  """Writes a setting as flags of the command line."""
  return [f"--config.{stage + '.' if stage else ''}{key}={value}" for key, value in setting.items()]
