"""Estimates the time of a compiled step, the days of a run, and the images per second that the input must supply."""

import math
from typing import Any

from beit_jax.plan.topology import Topology

RING_PASSES = {
  "all-reduce": 2.0
}  # a ring sends every byte twice (reduce, then gather); other collectives once
SPARE_CORES = 4  # of a host, for the process that drives the chips


def estimate(
  found: dict[str, Any], topology: Topology, utilization: float, rate: float
) -> dict[str, Any] | None:
  """Estimates how long a step takes: as long as the slowest of compute, main memory and links between chips.

  Main memory and links run at their full bandwidth. Latency, waiting for data, evaluation and checkpoints are left out.

  Args:
    found: a result of `compile.compile_step`.
    topology: the slice.
    utilization: the fraction of the peak at which matrix products run.
    rate: images/s that one core of a host can read, decode and crop.

  Returns:
    The estimate, or None for devices without published numbers.
  """
  chip = topology.chip
  if chip is None:
    return None
  num_devices = math.prod(found["mesh"].values())
  sent = sum(RING_PASSES.get(kind, 1.0) * moved["bytes"] for kind, moved in found["collectives"].items())
  times = {
    "compute": found["flops_per_device"] * chip.devices / (chip.flops * utilization),
    "memory": found["traffic_per_device"] * chip.devices / chip.hbm_bandwidth,
    "interconnect": sent * chip.devices / chip.ici if num_devices > 1 else 0.0,
  }
  seconds, bound = max((seconds, name) for name, seconds in times.items())
  images = found["batch_size"] / seconds
  workers = math.ceil(images / topology.hosts / rate)
  return dict(
    seconds=times,
    bound=bound,
    step_seconds=seconds,
    images_per_second=images,
    days=found["total_steps"] * seconds / 86400,
    utilization=utilization,
    hosts=topology.hosts,
    rate_per_core=rate,
    workers_per_host=workers,
    cores_per_host=chip.cores,
    input_keeps_up=workers <= chip.cores - SPARE_CORES,
  )
