"""Slices of accelerators by name, and the published numbers of their chips.

A slice is "KIND:GRID", such as "v5e:16x16": the chips of a generation in a grid of two or three sides, as libtpu
names them. "cpu:8" is eight virtual CPU devices of this machine, which need no libtpu.
"""

import difflib
import importlib.util
import math
import re
from typing import Any, NamedTuple

from beit_jax.errors import UserError

GIB = 2.0**30


class Chip(NamedTuple):
  """The published numbers of one chip."""

  flops: float  # peak of bfloat16 products, per second
  hbm: float  # bytes of main memory
  hbm_bandwidth: float  # bytes/s
  ici: float  # bytes/s to other chips in one direction, all links together
  sides: int  # of the grid of a slice, 2 or 3
  host: int  # chips that one host drives
  cores: int  # of one host, as its operating system counts them
  devices: int = 1  # JAX devices of one chip


# Google Cloud, "TPU architecture" and the page of each generation ("Key chip specifications": peak compute per chip,
# HBM capacity and bandwidth, interchip interconnect in Gbps, here / 8) and "TPU VM types" (chips and vCPUs of a host).
# v4: JAX on a real v4 joins the two cores of a chip into one device ("megacore"). libtpu's description of a slice keeps
# them apart, each with half of the memory, so a plan for v4 is conservative.
CHIPS: dict[str, Chip] = {
  "v4": Chip(275e12, 32 * GIB, 1228e9, 2400e9 / 8, 3, 4, 240, devices=2),
  "v5e": Chip(197e12, 16 * GIB, 819e9, 1600e9 / 8, 2, 4, 112),
  "v5p": Chip(459e12, 95 * GIB, 2765e9, 4800e9 / 8, 3, 4, 208),
  "v6e": Chip(918e12, 32 * GIB, 1640e9, 3584e9 / 8, 2, 4, 180),
  "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 9600e9 / 8, 3, 4, 224, devices=2),
}
ALIASES = {"v5lite": "v5e", "v5litepod": "v5e", "v5": "v5p", "v6": "v6e", "trillium": "v6e"}
ALIASES |= {"v7": "tpu7x", "v7x": "tpu7x", "ironwood": "tpu7x"}
MAX_CHIPS, MAX_CPU_DEVICES = 2**14, 64
EXAMPLES = {1: "8", 2: "16x16", 3: "4x4x4"}  # by the number of sides
LIBTPU = "pip install -e '.[plan]' (libtpu, which compiles for TPUs on a machine that has none)"


class Topology(NamedTuple):
  """A slice; `platform` is a key of `CHIPS`, or "cpu"."""

  platform: str
  grid: tuple[int, ...]

  @property
  def name(self) -> str:
    return f"{self.platform}:{'x'.join(map(str, self.grid))}"

  @property
  def chip(self) -> Chip | None:
    return CHIPS.get(self.platform)

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
  """Parses a name such as "v5e:16x16".

  Raises:
    UserError: the kind is unknown, or its slices cannot have this grid.
  """
  platform, _, sides = text.strip().lower().partition(":")
  platform = ALIASES.get(platform, platform)
  if platform not in CHIPS and platform != "cpu":
    near = difflib.get_close_matches(platform, [*CHIPS, "cpu"], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(
      f"--topology={text}: unknown kind {platform!r}; choose from {', '.join(CHIPS)}, cpu{hint}"
    )
  num_sides, most = (1, MAX_CPU_DEVICES) if platform == "cpu" else (CHIPS[platform].sides, MAX_CHIPS)
  grid = tuple(map(int, sides.split("x"))) if re.fullmatch(r"\d{1,5}(x\d{1,5})*", sides) else ()
  topology = Topology(platform, grid)
  problem = ""
  if len(grid) != num_sides:
    problem = f"a grid of {platform} has {num_sides} side{'s' * (num_sides > 1)}"
  elif not 0 < topology.chips <= most:
    problem = f"a slice has 1 to {most:,} chips, not {topology.chips:,}"
  elif topology.chip and topology.chips > 2 and (grid[0] % 2 or grid[1] % 2):
    problem = "a host has 2x2 chips, so the first two sides must be even"
  if problem:
    raise UserError(f"--topology={text}: {problem}, as in {platform}:{EXAMPLES[num_sides]}")
  return topology


def environment(topology: Topology) -> dict[str, str]:
  """Returns the environment variables for a process that compiles for a slice; JAX reads them when it starts."""
  # A program from the compilation cache has no text and no memory analysis.
  common = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "JAX_ENABLE_COMPILATION_CACHE": "false"}
  if topology.platform == "cpu":
    return common | {"JAX_NUM_CPU_DEVICES": str(topology.num_devices)}
  return common | {
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes with libtpu would collide on a lock file
    "TPU_WORKER_HOSTNAMES": "localhost",
  }


def devices(topology: Topology) -> list[Any]:
  """Returns the devices of a slice that need not exist: they serve for shardings and compilation, not for arrays.

  Raises:
    UserError: libtpu is not installed, or it does not know the slice.
  """
  import jax  # only the process that compiles needs it

  if topology.platform == "cpu":
    found = jax.devices("cpu")
    if len(found) < topology.num_devices:
      raise UserError(f"--topology={topology.name}: this process has only {len(found)} CPU devices")
    return found[: topology.num_devices]
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(f"--topology={topology.name} needs {LIBTPU}; --topology=cpu:8 works without it")
  from jax.experimental import topologies

  # For a slice smaller than a host, not every libtpu knows the host's shape (0.0.42 does not, 0.0.52 does).
  host = [*(min(side, 2) for side in topology.grid[:2]), 1]
  bounds = {"chips_per_host_bounds": host} if topology.chips < 4 else {}
  try:
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **bounds)
    return list(description.devices)
  except Exception as error:  # libtpu's own, of a type that JAX does not export
    reason = str(error).strip().splitlines()[0][:300]
    raise UserError(f"--topology={topology.name}: libtpu does not know this slice ({reason})") from None
