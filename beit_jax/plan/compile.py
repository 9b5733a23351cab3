"""Compiles the training step of one run for a slice and says what came out, as JSON. Run as a process of its own.

`python -m beit_jax.plan.compile` takes {"argv", "topology", "stage", "examples", "overrides"} on its standard input. A
compiler that dies, or takes all memory, then leaves the one who asked alive.
"""

import json
import math
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from beit_jax import objectives, trees
from beit_jax.config import parse as config_lib
from beit_jax.errors import UserError
from beit_jax.plan import abstract, flops, hlo, topology

MARK = "beit_jax.plan: "  # before the answer, among whatever the compiler prints
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def stages_of(config: Any) -> dict[str, Any]:
  """The runs of a config by name; one that has no stages is ""."""
  return {name: config[name] for name in config.stages} if "stages" in config else {"": config}


def choose(stages: dict[str, Any], wanted: str | None) -> str:
  """The stage asked for; else the pre-training; else the last that trains.

  Raises:
    UserError: no such stage, or none that trains.
  """
  trains = [
    n for n, stage in stages.items() if objectives.OBJECTIVES[stage.objective].trains and not stage.eval_only
  ]
  if wanted is not None and wanted not in trains:
    what = "is no stage that trains" if wanted in stages else "is unknown"
    raise UserError(f"--stage={wanted}: {what}; there are {', '.join(filter(None, trains)) or 'no stages'}")
  if not trains:
    raise UserError("this config trains nothing, so there is no training step to plan")
  beit = [name for name in trains if stages[name].objective == "beit"]
  return wanted if wanted is not None else (beit or trains[-1:])[0]


def per_image(
  config: Any, stages: dict[str, Any], step: abstract.Step, traced: Any, examples: int | None
) -> dict:
  """FLOPs of one image: the forward pass in parts, the whole step, and what recomputation (remat) adds to it."""
  objective = step.plan.objective
  with jax.set_mesh(step.mesh):
    variables = {"params": step.state.params, **step.state.collections}
    key = jax.eval_shape(lambda: jax.random.key(0))
    clock = jax.ShapeDtypeStruct((), jnp.int32)
    loss = lambda *args: objective.loss(*args)[0]
    forward = flops.count(loss, variables, step.frozen, step.batch, key, clock)
  whole = flops.count_jaxpr(traced.jaxpr.jaxpr)
  model = whole
  if config.model.get("remat"):
    plain = config.copy_and_resolve_references()
    plain.model.remat = False
    devices = list(step.mesh.devices.flat)
    model = flops.count_jaxpr(abstract.make_step(plain, stages, devices, examples).trace().jaxpr.jaxpr)
  size = config.batch_size
  parts: dict[str, float] = {}
  fields = getattr(objective.module, "encoder", None)
  if isinstance(fields, dict):
    parts |= {name: float(value) for name, value in flops.encoder(fields).items()}
  tokenizer = getattr(objective, "tokenizer", None)
  if tokenizer is not None and not config.tokenizer.cache:
    own = {
      name: getattr(tokenizer.module, name)
      for name in ("n_hid", "n_blk_per_group", "group_count", "vocab_size")
    }
    parts["tokenizer"] = float(flops.tokenizer(own, objective.token_image_size))
  parts["head" if parts else "model"] = forward / size - sum(parts.values())
  return dict(
    forward=parts, backward=(model - forward) / size, step=model / size, recomputed=(whole - model) / size
  )


def memory_of(step: abstract.Step, stats: Any) -> dict[str, float]:
  """Bytes on one device, and their sum, the peak. The state is updated in place; all of what is frozen is there."""
  on_device = lambda tree: sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree)
  )
  parts = dict(state=on_device(step.state), frozen=on_device(step.frozen), batch=on_device(step.batch))
  parts |= dict(temporaries=stats.temp_size_in_bytes, program=stats.generated_code_size_in_bytes)
  parts["other"] = (
    stats.output_size_in_bytes - stats.alias_size_in_bytes
  )  # what is not written into the arguments
  return parts | {"peak": sum(parts.values())}


def too_large(message: str) -> dict[str, float] | None:
  """Bytes that the compiler would need and has, out of its refusal; None when it failed at something else."""
  if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
    return None
  number = r"([\d.]+)([KMGT]?)"
  for form in (rf"Used {number} of {number} hbm", rf"\({number}\) exceeds available HBM \({number}\)"):
    found = re.search(form, message)
    if found:
      used, unit, limit, other = found.groups()
      return {"peak": float(used) * UNITS[unit], "limit": float(limit) * UNITS[other]}
  return {}


def compile_step(
  spec: str,
  overrides: list[tuple[str, Any]],
  where: topology.Topology,
  stage: str | None,
  examples: int | None,
) -> dict[str, Any]:
  """What the plan of one setting rests on; see `beit_jax.plan.report` for what is made of it."""
  stages = stages_of(config_lib.load(spec, overrides, objectives.schemas()))
  name = choose(stages, stage)
  config, devices = stages[name], topology.devices(where)
  step = abstract.make_step(config, stages, devices, examples)
  traced = step.trace()
  result: dict[str, Any] = dict(
    stage=name,
    objective=config.objective,
    batch_size=config.batch_size,
    microbatches=config.microbatches,
    mesh=dict(step.mesh.shape),
    mesh_data=config.mesh.data,
    model={key: config.model.get(key) for key in ("remat", "scan", "dtype")},
    parameters=trees.num_params(step.plan.param_shapes),
    state_bytes=trees.num_bytes(
      (step.state, step.state.params)
    ),  # the gradients are as large as the parameters
    examples=len(step.plan.source),
    total_steps=step.plan.total_steps,
    flops_per_image=per_image(config, stages, step, traced, examples),
  )
  began = time.monotonic()
  lowered = traced.lower()
  try:
    compiled = lowered.compile()
  except Exception as error:  # the compiler's own
    memory = too_large(str(error))
    if memory is None:
      raise
    return result | dict(fits=False, memory=memory, seconds=time.monotonic() - began)
  result |= dict(
    fits=True, memory=memory_of(step, compiled.memory_analysis()), seconds=time.monotonic() - began
  )
  try:  # a libtpu much newer than jaxlib writes what this cannot read
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


def main() -> int:
  asked = json.load(sys.stdin)
  where = topology.parse(asked["topology"])
  overrides = [tuple(pair) for pair in asked["overrides"]]
  try:
    answer = compile_step(asked["spec"], overrides, where, asked["stage"], asked["examples"])
  except UserError as error:
    answer = {"error": str(error)}
  print(f"\n{MARK}{json.dumps(answer)}", flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
