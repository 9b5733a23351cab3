"""Slices of accelerators by name, and what one chip of each can do.

A slice is "KIND:GRID", such as "v5e:16x16": the chips of that generation in a grid of two or three sides. libtpu knows
it by the same name. "cpu:8" is eight pretended devices of this machine, for trying things out without libtpu.
"""

import difflib
import importlib.util
import math
import re
from typing import Any, NamedTuple

from beit_jax.errors import UserError

GIB = 2.0**30


class Chip(NamedTuple):
  """Published numbers of one chip; `devices`: what JAX sees of it; bandwidths in bytes/s, `ici` one way, all links."""

  flops: float  # peak of bfloat16 products, per second
  hbm: float  # bytes
  hbm_bandwidth: float
  ici: float
  sides: int  # of a grid: 2 or 3
  host: int  # chips that one host drives
  cores: int  # of one host, as the system sees them
  devices: int = 1


# Google Cloud, "TPU architecture" and the page of each generation ("Key chip specifications": peak compute per chip,
# HBM capacity and bandwidth, interchip interconnect in Gbps, here / 8) and "TPU VM types" (chips and vCPUs of a host).
# v4: JAX on a real v4 joins the two cores of a chip into one device ("megacore"); libtpu's description of a slice has
# them apart, each with half of the memory, so that a plan for v4 is on the safe side.
CHIPS: dict[str, Chip] = {
  "v4": Chip(275e12, 32 * GIB, 1228e9, 2400e9 / 8, 3, 4, 240, devices=2),
  "v5e": Chip(197e12, 16 * GIB, 819e9, 1600e9 / 8, 2, 4, 112),
  "v5p": Chip(459e12, 95 * GIB, 2765e9, 4800e9 / 8, 3, 4, 208),
  "v6e": Chip(918e12, 32 * GIB, 1640e9, 3584e9 / 8, 2, 4, 180),
  "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 9600e9 / 8, 3, 4, 224, devices=2),
}
ALIASES = {"v5lite": "v5e", "v5litepod": "v5e", "v5": "v5p", "v6": "v6e", "trillium": "v6e"}
ALIASES |= {"v7": "tpu7x", "v7x": "tpu7x", "ironwood": "tpu7x"}
MAX_CHIPS = 2**14
LIBTPU = "pip install -e '.[plan]' (libtpu, which compiles for TPUs on a machine that has none)"


class Topology(NamedTuple):
  kind: str  # a key of CHIPS, or "cpu"
  grid: tuple[int, ...]

  @property
  def name(self) -> str:
    return f"{self.kind}:{'x'.join(map(str, self.grid))}"

  @property
  def chip(self) -> Chip | None:
    return CHIPS.get(self.kind)

  @property
  def chips(self) -> int:
    return math.prod(self.grid)

  @property
  def num_devices(self) -> int:
    return self.chips * (self.chip.devices if self.chip else 1)

  @property
  def hosts(self) -> int:
    return -(-self.chips // self.chip.host) if self.chip else 1


def parse(text: str) -> Topology:
  """ "v5e:16x16" -> Topology.

  Raises:
    UserError: no such kind, or a grid that its slices cannot have.
  """
  kind, colon, sides = text.strip().lower().partition(":")
  kind = ALIASES.get(kind, kind)
  if kind not in CHIPS and kind != "cpu":
    near = difflib.get_close_matches(kind, [*CHIPS, "cpu"], 1)
    raise UserError(
      f"--topology={text}: {kind!r} is unknown; there are {', '.join(CHIPS)} and cpu"
      + (f"; did you mean {near[0]!r}?" if near else "")
    )
  example = {"cpu": "cpu:8"}.get(
    kind, f"{kind}:" + {2: "16x16", 3: "4x4x4"}[CHIPS.get(kind, CHIPS["v5e"]).sides]
  )
  if not re.fullmatch(r"\d{1,5}(x\d{1,5})*", sides):
    raise UserError(f"--topology={text}: expected a kind and a grid of chips, such as {example}")
  grid = tuple(map(int, sides.split("x")))
  wanted = 1 if kind == "cpu" else CHIPS[kind].sides
  if len(grid) != wanted:
    raise UserError(
      f"--topology={text}: a grid of {kind} has {wanted} side{'s' * (wanted > 1)}, such as {example}"
    )
  if not 0 < math.prod(grid) <= (64 if kind == "cpu" else MAX_CHIPS):
    raise UserError(
      f"--topology={text}: {math.prod(grid):,} chips are none or too many, expected such as {example}"
    )
  if kind != "cpu" and math.prod(grid) > 1 and (grid[0] % 2 or grid[1] % 2) and math.prod(grid) != 2:
    raise UserError(
      f"--topology={text}: a host has 2x2 chips, so the first two sides must be even, such as {example}"
    )
  return Topology(kind, grid)


def environment(topology: Topology) -> dict[str, str]:
  """What a process that compiles for it needs in its environment; nothing of it can be set once JAX is up."""
  # A program out of the compilation cache has no text and no memory analysis.
  common = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "JAX_ENABLE_COMPILATION_CACHE": "false"}
  if topology.kind == "cpu":
    return common | {"JAX_NUM_CPU_DEVICES": str(topology.num_devices)}
  # Two processes with libtpu on one machine collide on a lock file, and there is no metadata server to ask.
  quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
  return (
    common
    | quiet
    | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
  )


def devices(topology: Topology) -> list[Any]:
  """The devices of a slice that need not exist: for shardings and compilation, not for arrays.

  Raises:
    UserError: no libtpu, or it does not know the slice.
  """
  import jax  # here: the process that only asks has no use for it

  if topology.kind == "cpu":
    found = jax.devices("cpu")
    if len(found) < topology.num_devices:
      raise UserError(f"--topology={topology.name}: this process has {len(found)} CPU devices")
    return found[: topology.num_devices]
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(f"--topology={topology.name} needs {LIBTPU}; --topology=cpu:8 works without")
  from jax.experimental import topologies

  # Of a slice below a whole host not every libtpu knows the host (0.0.42 does not, 0.0.52 does).
  host = [*(min(side, 2) for side in topology.grid[:2]), 1]
  bounds = {"chips_per_host_bounds": host} if topology.chips < 4 else {}
  try:
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **bounds)
    return list(slice_.devices)
  except Exception as error:  # libtpu's own, of a type that JAX does not export
    reason = str(error).strip().splitlines()[0][:300]
    raise UserError(f"--topology={topology.name}: libtpu does not know this slice ({reason})") from None
