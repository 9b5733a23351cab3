"""A plan in words."""

from collections.abc import Iterator
from typing import Any

from beit_jax.plan.topology import GIB, Topology

UNITS = ((GIB, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
MEMORY = {
  "state": "parameters and moments",
  "frozen": "frozen",
  "batch": "batch",
  "temporaries": "temporaries",
}


def size(count: float) -> str:
  unit, name = next((pair for pair in UNITS if count >= 0.1 * pair[0]), UNITS[-1])
  return f"{count / unit:.2f} {name}"


def _flops(count: float) -> str:
  return f"{count / 1e12:,.2f} TFLOP" if count >= 1e12 else f"{count / 1e9:,.3f} GFLOP"


def text(plan: dict[str, Any], where: Topology) -> str:
  """Of what `__main__.make` returns: a line, or a few, under each heading."""
  return "\n".join(f"{heading:<10} {line}" for heading, line in _lines(plan, where))


def _lines(plan: dict[str, Any], where: Topology) -> Iterator[tuple[str, str]]:
  found, mesh = plan["found"], plan["found"]["mesh"]
  devices, batch = mesh["data"] * mesh["fsdp"], found["batch_size"]
  switches = "".join(f", {key}={value}" for key, value in found["model"].items() if value is not None)
  name = found["stage"] or found["objective"]
  yield "run", f"{plan['config']}, {name}: {found['parameters'] / 1e6:.1f} M parameters{switches}"
  per_chip = f", {where.chip.devices} devices a chip" if where.chip and where.chip.devices > 1 else ""
  yield "topology", f"{where.name}, chips: {where.chips}, hosts: {where.hosts}{per_chip}"
  parts = f", {found['microbatches']} parts" if found["microbatches"] > 1 else ""
  yield (
    "mesh",
    f"data={mesh['data']} x fsdp={mesh['fsdp']}, batch {batch}: {batch // devices} a device{parts}",
  )
  yield "fits", _fits(found, plan["hbm"])
  if "state" in found["memory"]:
    yield "memory", ", ".join(f"{label} {size(found['memory'][key])}" for key, label in MEMORY.items())
  yield from _work(plan, devices)
  yield from _time(plan["roofline"], found) if plan["roofline"] else ()
  yield "compiled", f"in {found['seconds']:.0f} s with {plan['compiler']}"
  for tried in plan["tried"]:
    yield "tried", f"{' '.join(tried['flags'])}: {_fits({**tried, 'memory': tried}, plan['hbm'])}"
  if not found["fits"]:
    works = next((" ".join(tried["flags"]) for tried in plan["tried"] if tried["fits"]), "")
    others = (
      f"; it does with {works}" if works else ", nor does anything that was tried" if plan["tried"] else ""
    )
    yield "=>", f"does not fit{others}"


def _fits(found: dict[str, Any], limit: float | None) -> str:
  peak = found["memory"].get("peak")
  if limit is None:
    return f"nobody can say: these devices have no memory of their own; peak {size(peak)} a device"
  needs = f"{size(peak)} of {size(limit)} a device" if peak else f"more than the {size(limit)} of a device"
  return f"{'yes' if found['fits'] else 'NO'}, {needs}"


def _work(plan: dict[str, Any], devices: int) -> Iterator[tuple[str, str]]:
  found, flops = plan["found"], plan["found"]["flops_per_image"]
  parts = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in flops["forward"].items())
  again = f", recomputed {flops['recomputed'] / 1e9:.3g}" if flops["recomputed"] else ""
  yield "an image", f"{_flops(flops['step'])}: forward {parts}; backward {flops['backward'] / 1e9:.3g}{again}"
  whole = (flops["step"] + flops["recomputed"]) * found["batch_size"]
  yield "a step", f"{_flops(whole)}, {_flops(whole / devices)} a device, counted by hand"
  if "unread" in found:
    yield "", f"the compiled program cannot be read, use the libtpu that this jax asks for: {found['unread']}"
  if "collectives" not in found:
    return
  loops = f" (loops of {', '.join(map(str, found['loops']))})" if found["loops"] else ""
  xla = f"XLA counts {_flops(found['xla']['flops'])}" if plan["xla_counts"] else "XLA takes loops once"
  yield "", f"{_flops(found['flops_per_device'])} a device in the compiled program{loops}; {xla}"
  for kind, moved in found["collectives"].items():
    unknown = f", {moved['unknown']} in loops of unknown length" if moved["unknown"] else ""
    yield "moved", f"{kind}: {size(moved['bytes'])} a device in {moved['count']}{unknown}"
  if not found["collectives"]:
    yield "moved", "nothing between devices"


def _time(roof: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[str, str]]:
  times = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in roof["seconds"].items())
  yield (
    "time",
    f"{1e3 * roof['step_seconds']:.1f} ms a step at {roof['utilization']:.0%} of the peak, bound by {roof['bound']} "
    f"(ms: {times})",
  )
  yield (
    "days",
    f"{roof['days']:.2f} for {found['total_steps']:,} steps ({found['examples']:,} examples), without evaluation and "
    "checkpoints",
  )
  rate, workers, each = roof["images_per_second"], roof["workers_per_host"], roof["rate_per_core"]
  short = "" if roof["input_keeps_up"] else ": NOT ENOUGH, the chips will wait for data"
  yield (
    "input",
    f"{rate:,.0f} images/s, {rate / roof['hosts']:,.0f} a host: {workers} workers at {each:g} images/s "
    f"each, of {roof['cores_per_host']} cores{short}",
  )
