"""Compiles the training step of one run for a slice and prints what it found as JSON.

`python -m beit_jax.plan.compile` reads a request from its standard input. It is a process of its own, so that a
compiler that crashes or takes all memory does not end the command that waits for it.
"""

import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from beit_jax import objectives, trees
from beit_jax.config import parse as config_lib
from beit_jax.errors import UserError
from beit_jax.objectives import Objective, stages
from beit_jax.objectives.stages import Stage
from beit_jax.plan import ANSWER, abstract, flops, hlo, topology
from beit_jax.weights.kinds import KINDS

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Name of a submodule -> part of the model.
PARTS = {"patch_embed": "embedding", "attn": "attention", "mlp": "mlp"}
REST = "head"


def compile_step(
  spec: str,
  overrides: list[tuple[str, Any]],
  slice_: topology.Topology,
  stage: str | None,
  examples: int | None,
) -> dict[str, Any]:
  """Compiles the training step of one setting.

  Args:
    spec: the config file and its variant.
    overrides: dotted config keys and their values.
    slice_: the devices.
    stage: see `choose`.
    examples: the number of training examples, or None to ask the data.

  Returns:
    What a plan rests on; `beit_jax.plan.report` prints it.

  Raises:
    UserError: the setting cannot be planned.
  """
  config = config_lib.load(spec, overrides, objectives.schemas())
  runs = [run for run in stages.resolve(config, Path("runs")) if not run.is_replaced]
  run, step, traced = choose(runs, stage, topology.devices(slice_), examples)
  config = run.config
  result: dict[str, Any] = dict(
    stage=run.name,
    objective=config.objective,
    batch_size=config.batch_size,
    microbatches=config.microbatches,
    mesh=dict(step.mesh.shape),
    mesh_data=config.mesh.data,
    model={key: config.model.get(key) for key in ("remat", "scan", "dtype")},
    parameters=trees.num_params(step.plan.param_shapes),
    state_bytes=trees.num_bytes((step.state, step.state.params)),  # gradients are as large as the parameters
    examples=len(step.plan.source),
    total_steps=step.plan.total_steps,
    flops_per_image=flops_per_image(step, traced),
  )
  began = time.monotonic()
  try:
    compiled = traced.lower().compile()
  except Exception as error:  # the compiler's own
    memory = memory_of_refusal(str(error))
    if memory is None:
      raise
    return result | dict(fits=False, memory=memory, seconds=time.monotonic() - began)
  memory = memory_of(step, compiled.memory_analysis())
  result |= dict(fits=True, memory=memory, seconds=time.monotonic() - began)
  try:  # jaxlib cannot read the programs of a much newer libtpu
    program = hlo.read(compiled.as_text())
  except jax.errors.JaxRuntimeError as error:
    return result | dict(unread=str(error).splitlines()[0][:200])
  cost = compiled.cost_analysis() or {}
  return result | dict(
    collectives={kind: vars(moved) for kind, moved in program.collectives.items()},
    flops_per_device=program.flops,
    traffic_per_device=program.traffic,
    loops=list(program.loops),
    xla=dict(flops=cost.get("flops"), bytes=cost.get("bytes accessed")),
  )


def choose(
  runs: list[Stage], wanted: str | None, devices: list[Any], examples: int | None
) -> tuple[Stage, abstract.Step, Any]:
  """Chooses the stage to plan: the wanted one, else the one that computes most from its first step to its last.

  Returns:
    The stage, its training step, and the trace of that.

  Raises:
    UserError: the wanted stage does not exist, no stage trains, or a stage cannot be planned.
  """
  trained = {run.name: run for run in runs if run.objective.trains and not run.config.eval_only}
  if wanted is not None and wanted not in trained:
    problem = "does not train" if any(run.name == wanted for run in runs) else "is unknown"
    raise UserError(f"--stage={wanted}: this stage {problem}; there are {', '.join(trained) or 'no others'}")
  if not trained:
    raise UserError("this config trains nothing, so there is no training step to plan")
  found: list[tuple[Stage, abstract.Step, Any]] = []
  for name in trained if wanted is None else [wanted]:
    try:
      step = abstract.make_step(trained[name], devices, examples)
    except UserError as error:
      if wanted is not None or len(trained) == 1:
        raise
      raise UserError(f"stage {name!r} cannot be planned: {error}; --stage=NAME plans another one") from None
    found.append((trained[name], step, step.trace()))
  return max(found, key=lambda item: item[1].plan.total_steps * flops.of(item[2]).total())


def flops_per_image(step: abstract.Step, traced: Any) -> dict[str, Any]:
  """Divides the FLOPs of a step among forward pass (in parts), backward pass and recomputation, per image."""
  forward: Counter[str] = Counter()
  backward = recomputed = 0
  for scope, work in flops.of(traced).items():
    if "rematted_computation" in scope:
      recomputed += work
    elif "transpose(" in scope:
      backward += work
    else:
      forward[_part(scope, step.plan.objective)] += work
  images, rest = step.batch["valid"].size, "model" if set(forward) == {REST} else REST
  order = (*PARTS.values(), *step.plan.objective.frozen_sections)
  named = {part: forward[part] / images for part in order if part in forward}
  return dict(
    forward=named | {rest: forward[REST] / images},
    backward=backward / images,
    step=(forward.total() + backward) / images,
    recomputed=recomputed / images,
  )


def _part(scope: str, objective: Objective) -> str:
  """The part of the model that a named scope of the forward pass belongs to."""
  words = re.findall(r"\w+", scope)
  for word in words:
    if word in PARTS or word in objective.frozen_sections:
      return PARTS.get(word, word)
  frozen = {kind.module.__name__ for kind in KINDS.values()} - {type(objective.module).__name__}
  return objective.frozen_sections[0] if objective.frozen_sections and frozen & set(words) else REST


def memory_of(step: abstract.Step, stats: Any) -> dict[str, float]:
  """Bytes on one device by use, and their sum, the peak.

  The state is updated in place. Everything frozen is on the device, also what the step does not use.

  Args:
    step: the step.
    stats: the compiler's `memory_analysis` of it.
  """

  def on_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)

  parts = dict(
    state=on_device(step.state),
    frozen=on_device(step.frozen),
    batch=on_device(step.batch),
    temporaries=stats.temp_size_in_bytes,
    program=stats.generated_code_size_in_bytes,
    other=stats.output_size_in_bytes - stats.alias_size_in_bytes,  # outputs that do not replace an argument
  )
  return parts | {"peak": sum(parts.values())}


def memory_of_refusal(message: str) -> dict[str, float] | None:
  """Reads from the compiler's error how many bytes it needs and has; None if memory is not the reason."""
  if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
    return None
  number = r"([\d.]+)([KMGT]?)"
  for form in (rf"Used {number} of {number} hbm", rf"\({number}\) exceeds available HBM \({number}\)"):
    found = re.search(form, message)
    if found:
      used, unit, limit, other = found.groups()
      return {"peak": float(used) * UNITS[unit], "limit": float(limit) * UNITS[other]}
  return {}


def main() -> int:
  request = json.load(sys.stdin)
  slice_ = topology.parse(request["topology"])
  overrides = [tuple(pair) for pair in request["overrides"]]
  try:
    answer = compile_step(request["spec"], overrides, slice_, request["stage"], request["examples"])
  except UserError as error:
    answer = {"error": str(error)}
  print(f"\n{ANSWER}{json.dumps(answer)}", flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
