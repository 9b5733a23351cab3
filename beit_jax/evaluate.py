"""An objective's eval_step over a whole eval set, padding masked out: sums first, divide last."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from beit_jax import trees
from beit_jax.data import pipeline, sources
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.errors import UserError
from beit_jax.objectives import OBJECTIVES, Objective
from beit_jax.run import checkpoint, files
from beit_jax.runtime import bucket, sharding
from beit_jax.runtime.logs import log


def make_eval_step(objective: Objective, mesh: jax.sharding.Mesh) -> Callable[[Any, Any, Any], Any]:
  """`objective.eval_step`, jitted; what it returns is there in full on every process."""
  return jax.jit(objective.eval_step, out_shardings=sharding.replicated(mesh))


def evaluate(
  eval_step: Callable[[Any, Any, Any], Any],
  objective: Objective,
  variables: Any,
  frozen: Any,
  batches: Iterable[Any],
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """Adds the (sum, count) pairs of every batch in float64 and lets the objective divide.

  Returns:
    (the objective's metrics as floats, the valid rows of the whole set in order: see `Objective.eval_step`).
  """
  total, rows = None, []
  for batch in batches:
    sums = dict(jax.device_get(eval_step(variables, frozen, batch)))
    rows.append(sums.pop("rows", {}))
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
  valid = np.concatenate([row.pop("valid", np.zeros(0, bool)) for row in rows])
  whole = {name: np.concatenate([row[name] for row in rows])[valid] for name in rows[0]}
  return {**objective.summarize(total), **(objective.summarize_rows(whole) if whole else {})}, whole


def evaluate_all(
  config: ConfigDict,
  objective: Objective,
  eval_step: Any,
  variables: Any,
  frozen: Any,
  source: Any,
  mesh: Any,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """`evaluate` over a whole source, or the objective's own way."""
  if objective.evaluate_images is not None:
    return objective.evaluate_images(variables, source, mesh)
  batches = eval_batches(config, objective, source, mesh, config.eval.batch_size)
  return evaluate(eval_step, objective, variables, frozen, batches)


def eval_source(config: ConfigDict, class_names: tuple[str, ...] = ()) -> sources.Source | None:
  """The data of `eval.split`, or None without one, its classes numbered as in `class_names` where these are given.

  Raises:
    UserError: it has a class that is not among them.
  """
  if not config.eval.split:
    return None
  data = {**config.data.to_dict(), "split": config.eval.split, "fraction": config.eval.fraction}
  data |= {"num_examples": config.eval.num_examples}
  data |= {"num_classes": None} if class_names else {}
  source = sources.make_source(data)
  if class_names and source.class_names and tuple(class_names) != tuple(source.class_names):
    source.relabel(tuple(class_names))
  return source


def eval_batches(
  config: ConfigDict, objective: Objective, source: Any, mesh: jax.sharding.Mesh, batch_size: int
) -> Iterator[dict[str, jax.Array]]:
  """Global batches over the whole source, in order; the last one padded, with `valid` False there.

  Raises:
    UserError: more than data.max_bad of them cannot be read.
  """
  batch_size = -(-batch_size // mesh.size) * mesh.size
  rows = sharding.local_rows(mesh, batch_size)
  bad_images = BadImageTracker(source, config.data.max_bad, shuffled=False)
  host = pipeline.eval_batches(
    source,
    objective.reader(),
    rows=rows,
    batch_size=batch_size,
    threads=config.data.threads,
    bad_images=bad_images,
  )
  for batch in host:
    yield sharding.put_batch(mesh, batch, batch_size)
  if jax.process_count() > 1:  # each has read its own rows
    bad_images.check(int(multihost_utils.process_allgather(np.int32(bad_images.count)).sum()))


def _own_labels(workdir: Path, init_from: str) -> list[str]:
  """The class names in the description of the run that will be evaluated; [] where it is no run of ours."""
  for path in (workdir, bucket.path(init_from) if init_from else None):
    if path is not None and (
      (path / checkpoint.DESCRIPTION).is_file() or checkpoint.steps(path / "checkpoints")
    ):
      return list(checkpoint.read_description(checkpoint.find(path)).get("labels") or [])
  return []


def evaluate_only(config: ConfigDict, workdir: Path, name: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """`eval_only=True`, or an objective that trains nothing, over the whole of `eval.split`.

  The weights are those of the newest checkpoint of `workdir`, else of `init_from`.

  Returns:
    The content of workdir/eval.json: `eval` metrics, examples, seconds, images_per_second, checkpoint.

  Raises:
    UserError: no data, no checkpoint, or parameters that the checkpoint lacks.
  """
  own = config.objective == "classify" and _own_labels(workdir, config.init_from)
  source = eval_source(config, tuple(own or ()))
  if source is None:
    raise UserError("config key 'eval.split': empty, so there is nothing to evaluate on; name a split")
  kind = OBJECTIVES[config.objective]
  objective = kind(config, source if kind.trains else sources.make_source(config.data.to_dict()))
  shapes = dict(jax.eval_shape(objective.init, jax.random.key(0)))["params"]
  params, path = {}, config.get("encoder", {}).get("init_from", "")
  if objective.trains:
    path = workdir if checkpoint.steps(workdir / "checkpoints") else config.init_from
    if not path:
      raise UserError(f"eval_only: no checkpoint in {workdir}; give init_from, or the workdir of a run")
    found, path = objective.load_params(path, shapes)
    params = trees.unflatten({name: np.asarray(found[name]) for name in trees.flatten(shapes)})
  variables = {"params": jax.device_put(params, sharding.param_shardings(mesh, shapes))}
  if objective.trains:
    variables |= jax.device_put(objective.load_collections(path), sharding.replicated(mesh))
  frozen = jax.device_put(objective.frozen_params(mesh), sharding.replicated(mesh))
  began = time.monotonic()
  eval_step = make_eval_step(objective, mesh)
  metrics, rows = evaluate_all(config, objective, eval_step, variables, frozen, source, mesh)
  seconds = time.monotonic() - began
  result = dict(
    eval=metrics,
    examples=len(source),
    seconds=round(seconds, 1),
    images_per_second=round(len(source) / seconds, 1),
    checkpoint=path,
  )
  log.info("%s: %d examples  %s", name, len(source), "  ".join(f"{k} {v:.6g}" for k, v in metrics.items()))
  if jax.process_index() == 0:
    bucket.local(workdir).mkdir(parents=True, exist_ok=True)
    files.write_atomic(workdir / "eval.json", json.dumps(result, indent=1) + "\n")
    for file in objective.report(rows, metrics, bucket.local(workdir)):
      log.info("%s: %s", name, workdir / file.name)
    bucket.push()
  return result
