"""An objective's eval_step over a whole eval set, padding masked out: sums first, divide last."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from beit_jax import checkpoint, convert, sharding, trees
from beit_jax.data import pipeline, sources
from beit_jax.errors import UserError
from beit_jax.logs import log
from beit_jax.objectives import OBJECTIVES, Objective


def evaluate(
  eval_step: Callable[[Any, Any, Any], Any],
  summarize: Callable[[dict], dict[str, float]],
  variables: Any,
  frozen: Any,
  batches: Iterable[Any],
) -> dict[str, float]:
  """Adds the (sum, count) pairs of every batch on the device, fetches them once, and lets the objective divide.

  Returns:
    The objective's metrics as floats.
  """
  total = None
  for batch in batches:
    sums = eval_step(variables, frozen, batch)
    total = jax.block_until_ready(sums if total is None else jax.tree.map(jnp.add, total, sums))
  return summarize(jax.device_get(total))


def eval_source(config: ConfigDict) -> Any:
  """The data of `eval.split`, or None without one."""
  if not config.eval.split:
    return None
  data = {**config.data.to_dict(), "split": config.eval.split, "fraction": config.eval.fraction}
  return sources.make_source({**data, "num_examples": config.eval.num_examples})


def eval_batches(
  config: ConfigDict, objective: Objective, source: Any, mesh: jax.sharding.Mesh, batch_size: int
) -> Iterator[dict[str, jax.Array]]:
  """Global batches over the whole source, in order; the last one padded, with `valid` False there."""
  batch_size = -(-batch_size // mesh.size) * mesh.size
  rows = sharding.local_rows(mesh, batch_size)
  host = pipeline.eval_batches(
    source, objective.views(), config.data.to_dict(), rows=rows, batch_size=batch_size
  )
  return (sharding.put_batch(mesh, batch, batch_size) for batch in host)


def evaluate_only(config: ConfigDict, workdir: Path, name: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """`eval_only=True`: the newest checkpoint of `workdir`, else `init_from`, over the whole of `eval.split`.

  Returns:
    The content of workdir/eval.json: `eval` metrics, examples, seconds, images_per_second, checkpoint.

  Raises:
    UserError: no data, no checkpoint, or parameters that the checkpoint lacks.
  """
  source = eval_source(config)
  if source is None:
    raise UserError("config key 'eval.split': empty, so there is nothing to evaluate on; name a split")
  objective = OBJECTIVES[config.objective](config, source)
  path = workdir if checkpoint.steps(workdir / "checkpoints") else config.init_from
  if not path:
    raise UserError(f"eval_only: no checkpoint in {workdir}; give init_from, or the workdir of a run")
  shapes = dict(jax.eval_shape(objective.init, jax.random.key(0)))
  pretrained = convert.load(path)
  found = objective.adapt(pretrained, shapes["params"])
  missing = [n for n in trees.flatten(shapes["params"]) if n not in found]
  if missing:
    raise UserError(
      f"eval_only: {path} has no fitting {', '.join(missing)}; the data has {source.num_classes} classes, so "
      "set model.num_classes to the checkpoint's, or fine-tune first"
    )
  params = jax.device_put(
    trees.unflatten({n: np.asarray(found[n]) for n in trees.flatten(shapes["params"])}),
    sharding.param_shardings(mesh, shapes["params"]),
  )
  frozen = jax.device_put(objective.frozen_params(), sharding.replicated(mesh))
  began = time.monotonic()
  batches = eval_batches(config, objective, source, mesh, config.eval.batch_size)
  metrics = evaluate(jax.jit(objective.eval_step), objective.summarize, {"params": params}, frozen, batches)
  seconds = time.monotonic() - began
  result = dict(
    eval=metrics,
    examples=len(source),
    seconds=round(seconds, 1),
    images_per_second=round(len(source) / seconds, 1),
    checkpoint=str(pretrained.description.get("path")),
  )
  log.info("%s: %d examples  %s", name, len(source), "  ".join(f"{k} {v:.6g}" for k, v in metrics.items()))
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
  return result
