"""What a compiled step means in time: seconds a step, days a run, images a second that the input must supply."""

import math
from typing import Any

from beit_jax.plan.topology import Topology

WIRE = {"all-reduce": 2.0}  # a ring sends every byte twice (reduce, then gather), of the others once
SPARE_CORES = 4  # of a host, for the process that drives the chips


def estimate(
  found: dict[str, Any], where: Topology, utilization: float, rate: float
) -> dict[str, Any] | None:
  """Of the result of `compile_step`; None for devices without published numbers.

  Args:
    utilization: share of the peak at which products run.
    rate: images/s that one core of a host can read, decode and crop.

  A step takes as long as the slowest of three: products at that share of the peak, and what is moved to and from main
  memory, or over the links between chips, at their full bandwidth. Latency, waiting for data, evaluation and
  checkpoints are left out.
  """
  chip = where.chip
  if chip is None:
    return None
  devices = math.prod(found["mesh"].values())
  wire = sum(WIRE.get(kind, 1.0) * moved["bytes"] for kind, moved in found["collectives"].items())
  times = {
    "compute": found["flops_per_device"] * chip.devices / (chip.flops * utilization),
    "memory": found["traffic_per_device"] * chip.devices / chip.hbm_bandwidth,
    "interconnect": wire * chip.devices / chip.ici if devices > 1 else 0.0,
  }
  bound = max(times, key=times.get)
  seconds = times[bound]
  images = found["batch_size"] / seconds
  hosts = where.hosts
  workers = math.ceil(images / hosts / rate)
  return dict(
    seconds=times,
    bound=bound,
    step_seconds=seconds,
    images_per_second=images,
    days=found["total_steps"] * seconds / 86400,
    utilization=utilization,
    hosts=hosts,
    rate_per_core=rate,
    workers_per_host=workers,
    cores_per_host=chip.cores,
    input_keeps_up=workers <= chip.cores - SPARE_CORES,
  )
