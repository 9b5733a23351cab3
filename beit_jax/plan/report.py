"""Prints a plan as text."""

from collections.abc import Iterator
from typing import Any

from beit_jax.plan.topology import GIB, Topology

Line = tuple[str, str]  # heading, text
UNITS = ((GIB, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
MEMORY = {
  "state": "parameters and optimizer state",
  "frozen": "frozen",
  "batch": "batch",
  "temporaries": "temporaries",
}


def text(plan: dict[str, Any], topology: Topology) -> str:
  """Formats the result of `__main__.make`: one line, or a few, under each heading."""
  return "\n".join(f"{heading:<10} {line}" for heading, line in _lines(plan, topology))


def size(count: float) -> str:
  """Formats a number of bytes with a unit."""
  unit, name = next((pair for pair in UNITS if count >= 0.1 * pair[0]), UNITS[-1])
  return f"{count / unit:.2f} {name}"


def _flops(count: float) -> str:
  return f"{count / 1e12:,.2f} TFLOP" if count >= 1e12 else f"{count / 1e9:,.3f} GFLOP"


def _lines(plan: dict[str, Any], topology: Topology) -> Iterator[Line]:
  found, memory, chip = plan["found"], plan["found"]["memory"], topology.chip
  settings = "".join(f", {key}={value}" for key, value in found["model"].items() if value is not None)
  name = found["stage"] or found["objective"]
  yield "run", f"{plan['config']}, {name}: {found['parameters'] / 1e6:.1f} M parameters{settings}"
  per_chip = f", {chip.devices} devices a chip" if chip and chip.devices > 1 else ""
  yield "topology", f"{topology.name}, chips: {topology.chips}, hosts: {topology.hosts}{per_chip}"
  data, fsdp, batch = found["mesh"]["data"], found["mesh"]["fsdp"], found["batch_size"]
  parts = f", {found['microbatches']} microbatches" if found["microbatches"] > 1 else ""
  yield "mesh", f"data={data} x fsdp={fsdp}, batch {batch}: {batch // (data * fsdp)} a device{parts}"
  yield "fits", _fits(found["fits"], memory.get("peak"), plan["hbm"])
  if "state" in memory:
    yield "memory", ", ".join(f"{label} {size(memory[key])}" for key, label in MEMORY.items())
  yield from _work(plan, data * fsdp)
  if plan["roofline"]:
    yield from _time(plan["roofline"], found)
  yield "compiled", f"in {found['seconds']:.0f} s with {plan['compiler']}"
  for tried in plan["tried"]:
    yield "tried", f"{' '.join(tried['flags'])}: {_fits(tried['fits'], tried['peak'], plan['hbm'])}"
  if not found["fits"]:
    yield "=>", f"does not fit{_alternative(plan['tried'])}"


def _fits(fits: bool, peak: float | None, limit: float | None) -> str:
  if limit is None:
    return f"unknown: these devices have no memory of their own; peak {size(peak or 0)} a device"
  needs = f"{size(peak)} of {size(limit)} a device" if peak else f"more than the {size(limit)} of a device"
  return f"{'yes' if fits else 'NO'}, {needs}"


def _alternative(tried: list[dict[str, Any]]) -> str:
  for setting in tried:
    if setting["fits"]:
      return f"; it does with {' '.join(setting['flags'])}"
  return ", nor does any setting that was tried" if tried else ""


def _work(plan: dict[str, Any], num_devices: int) -> Iterator[Line]:
  found, flops = plan["found"], plan["found"]["flops_per_image"]
  parts = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in flops["forward"].items())
  recomputed = f", recomputed {flops['recomputed'] / 1e9:.3g}" if flops["recomputed"] else ""
  backward = f"{flops['backward'] / 1e9:.3g}"
  yield "an image", f"{_flops(flops['step'])}: forward {parts}; backward {backward}{recomputed}"
  step = (flops["step"] + flops["recomputed"]) * found["batch_size"]
  yield "a step", f"{_flops(step)}, {_flops(step / num_devices)} a device, counted from the trace"
  if "unread" in found:
    yield "", f"the compiled program is unreadable; install the libtpu that this jax wants: {found['unread']}"
  if "collectives" not in found:
    return
  loops = f" (loops of {', '.join(map(str, found['loops']))})" if found["loops"] else ""
  xla = f"XLA counts {_flops(found['xla']['flops'])}" if plan["xla_counts"] else "XLA counts a loop once"
  yield "", f"{_flops(found['flops_per_device'])} a device in the compiled program{loops}; {xla}"
  for kind, moved in found["collectives"].items():
    unknown = f", {moved['unknown']} in loops of unknown length" if moved["unknown"] else ""
    yield "moved", f"{kind}: {size(moved['bytes'])} a device in {moved['count']}{unknown}"
  if not found["collectives"]:
    yield "moved", "nothing between devices"


def _time(roof: dict[str, Any], found: dict[str, Any]) -> Iterator[Line]:
  times = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in roof["seconds"].items())
  step, peak = f"{1e3 * roof['step_seconds']:.1f} ms a step", f"{roof['utilization']:.0%} of the peak"
  yield "time", f"{step} at {peak}, bound by {roof['bound']} (ms: {times})"
  steps = f"{found['total_steps']:,} steps ({found['examples']:,} examples)"
  yield "days", f"{roof['days']:.2f} for {steps}, without evaluation and checkpoints"
  rate = roof["images_per_second"]
  workers = f"{roof['workers_per_host']} workers at {roof['rate_per_core']:g} images/s each"
  verdict = "" if roof["input_keeps_up"] else ": NOT ENOUGH, the chips will wait for data"
  per_host = f"{rate:,.0f} images/s, {rate / roof['hosts']:,.0f} a host"
  yield "input", f"{per_host}: {workers}, of {roof['cores_per_host']} cores{verdict}"
