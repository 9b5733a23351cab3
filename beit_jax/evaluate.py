"""Evaluation over a whole data set. Every example counts once, whatever the batch size and the mesh."""

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
from beit_jax.data import labels, pipeline, sources
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.errors import UserError
from beit_jax.objectives import EvalOutput, Objective, objective_of
from beit_jax.objectives.base import Batch, PyTree, Variables
from beit_jax.run import checkpoint, files, record
from beit_jax.runtime import bucket, sharding
from beit_jax.runtime.logs import log
from beit_jax.weights import io as weights_io
from beit_jax.weights.kinds import KINDS
from beit_jax.weights.pretrained import Pretrained

Rows = dict[str, np.ndarray]
EvalStep = Callable[[Variables, PyTree, Batch], EvalOutput]


def make_eval_step(objective: Objective, mesh: jax.sharding.Mesh) -> EvalStep:
  """Jits `objective.eval_step`; every process gets the whole result."""
  return jax.jit(objective.eval_step, out_shardings=sharding.replicated(mesh))


def evaluate(
  eval_step: EvalStep,
  objective: Objective,
  variables: Variables,
  frozen: PyTree,
  batches: Iterable[Batch],
) -> tuple[dict[str, float], Rows]:
  """Evaluates all batches: adds sums and counts in float64, and lets the objective divide.

  Returns:
    (the objective's metrics, the rows of all valid examples in order; see `EvalOutput`).
  """
  total, parts = None, []
  for batch in batches:
    output = jax.device_get(eval_step(variables, frozen, batch))
    parts.append(dict(output.rows))
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), dict(output.metrics))
    total = sums if total is None else jax.tree.map(np.add, total, sums)
  valid = np.concatenate([part.pop("valid", np.zeros(0, bool)) for part in parts])
  rows = {name: np.concatenate([part[name] for part in parts])[valid] for name in parts[0]}
  metrics = objective.summarize(total or {})
  return (metrics | objective.summarize_rows(rows) if rows else metrics), rows


def evaluate_all(
  config: ConfigDict,
  objective: Objective,
  eval_step: EvalStep,
  variables: Variables,
  frozen: PyTree,
  source: sources.Source,
  mesh: jax.sharding.Mesh,
) -> tuple[dict[str, float], Rows]:
  """`evaluate` over a whole source, or `objective.evaluate_images` if there is one."""
  if objective.evaluate_images is not None:
    return objective.evaluate_images(variables, source, mesh)
  batches = eval_batches(config, objective, source, mesh, config.eval.batch_size)
  return evaluate(eval_step, objective, variables, frozen, batches)


def check_finite(metrics: dict[str, float], source: sources.Source, is_result: bool = True) -> None:
  """Checks that every metric is a finite number.

  Args:
    metrics: of an evaluation.
    source: its data.
    is_result: whether these are the metrics of the whole run; others are followed by further steps.

  Raises:
    UserError: a metric is not finite. If it is not a result, a warning takes its place.
  """
  wrong = [f"{name}={value}" for name, value in metrics.items() if not np.isfinite(value)]
  if not wrong:
    return
  text = (
    f"evaluation on {source.description}: {', '.join(wrong)}; either no example has a label that counts, or the "
    "outputs of the model are not finite numbers"
  )
  if is_result:
    raise UserError(text)
  log.warning("%s", text)


def class_names_of_run(config: ConfigDict, workdir: Path | None) -> tuple[str, ...]:
  """The classes of the run that goes on, or starts from another; () if there is none."""
  try:
    return tuple(describe_run(workdir, config.resume, config.init_from).get("labels") or ())
  except UserError:  # the checkpoint is damaged; `train` decides what follows
    return ()


def train_source(config: ConfigDict, workdir: Path | None) -> sources.Source:
  """The training data.

  Versions up to 0.1 sorted numbers as text ("10" before "2"). The classes of a run that goes on, or of the run in
  `init_from`, therefore keep the numbers that it gave them.
  """
  source, names = sources.make_source(config.data.to_dict()), class_names_of_run(config, workdir)
  return labels.relabel(source, names) if sorted(names) == sorted(source.class_names) else source


def eval_source(
  config: ConfigDict, class_names: tuple[str, ...] = (), *, same_names: bool = True
) -> sources.Source | None:
  """The data of `eval.split`, or None if that is empty.

  Args:
    config: a complete config.
    class_names: the classes of the training data or of a checkpoint, whose numbers the evaluation data get; () = keep
      their own.
    same_names: see `labels.relabel`.

  Raises:
    UserError: there are no examples, or they have a class that is not among `class_names`.
  """
  if not config.eval.split:
    return None
  data = {**config.data.to_dict(), "split": config.eval.split, "fraction": config.eval.fraction}
  data["num_examples"] = config.eval.num_examples
  if class_names:
    data["num_classes"] = None
  source = sources.make_source(data)
  if not len(source):
    raise UserError(f"config key 'eval.split': no examples in {source.description}")
  return labels.relabel(source, class_names, same_names=same_names)


def eval_batches(
  config: ConfigDict, objective: Objective, source: sources.Source, mesh: jax.sharding.Mesh, batch_size: int
) -> Iterator[Batch]:
  """Global batches over a whole source, in order. The last one is padded; `valid` is False there.

  Raises:
    UserError: more than a share of data.max_bad of the examples cannot be read.
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
  if jax.process_count() > 1:  # each process has read its own rows
    bad_images.check(int(multihost_utils.process_allgather(np.int32(bad_images.count)).sum()))


def describe_run(*paths: str | Path | None) -> dict[str, Any]:
  """The description of the first of some folders that is a run with a checkpoint; {} if none is."""
  for path in filter(None, paths):
    folder = bucket.path(path)
    if (folder / checkpoint.DESCRIPTION).is_file() or checkpoint.steps(folder / "checkpoints"):
      return checkpoint.read_description(checkpoint.find(folder, items=[]))
  return {}


def eval_only_source(config: ConfigDict, workdir: Path) -> tuple[sources.Source | None, Pretrained | None]:
  """The data of `eval.split` with the class numbers of the checkpoint that `evaluate_only` evaluates.

  Returns:
    (the data, or None if `eval.split` is empty; the model of `init_from`, if it had to be loaded for its names).
  """
  kind, loaded, facts = objective_of(config), None, {}
  if kind.labels == "class":
    facts = describe_run(workdir, config.init_from)
    if not facts and config.init_from and kind.kind in KINDS:
      loaded = weights_io.load(config.init_from, ema=config.eval.ema)
      facts = loaded.description
  names = tuple(facts.get("labels") or ())
  return eval_source(config, names, same_names="dataset" in facts), loaded


def evaluate_only(config: ConfigDict, workdir: Path, name: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Evaluates the newest checkpoint of `workdir`, else `init_from`, over the whole of `eval.split`.

  Runs with `eval_only=True`, and objectives that train nothing, come here.

  Returns:
    The content of workdir/eval.json: `eval` metrics, examples, seconds, images_per_second, checkpoint.

  Raises:
    UserError: there are no data or no checkpoint, or the checkpoint lacks parameters.
  """
  kind = objective_of(config)
  if kind.trains:
    source, loaded = eval_only_source(config, workdir)
    own_source = source
  else:
    own_source, loaded = sources.make_source(config.data.to_dict()), None
    source = eval_source(config, tuple(own_source.class_names))
  if source is None:
    raise UserError("config key 'eval.split': empty, so there is nothing to evaluate on; name a split")
  parts = {"training": None if kind.trains else own_source, "evaluation": source}
  record.check_same_sources(name, config.eval.batch_size, parts)
  objective = kind(config, own_source)
  objective.check_source(source)
  variables, path = _load_variables(config, objective, workdir, mesh, loaded)
  frozen = jax.device_put(objective.frozen_params(mesh), sharding.replicated(mesh))
  began = time.monotonic()
  eval_step = make_eval_step(objective, mesh)
  metrics, rows = evaluate_all(config, objective, eval_step, variables, frozen, source, mesh)
  check_finite(metrics, source)
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


def _load_variables(
  config: ConfigDict,
  objective: Objective,
  workdir: Path,
  mesh: jax.sharding.Mesh,
  loaded: Pretrained | None,
) -> tuple[Variables, str]:
  """(Linen variables on the devices, path of the checkpoint that they come from). `loaded`: that of `init_from`."""
  if not objective.trains:
    return {"params": {}}, config.encoder.init_from
  shapes = jax.eval_shape(objective.init, jax.random.key(0))["params"]
  path = str(workdir) if checkpoint.steps(workdir / "checkpoints") else config.init_from
  if not path:
    raise UserError(f"eval_only: no checkpoint in {workdir}; give init_from, or the workdir of a run")
  found, path = objective.fit_params(loaded, shapes) if loaded else objective.load_params(path, shapes)
  params = trees.unflatten({name: np.asarray(found[name]) for name in trees.flatten(shapes)})
  collections = objective.load_collections(path)
  return {
    "params": jax.device_put(params, sharding.param_shardings(mesh, shapes)),
    **jax.device_put(collections, sharding.replicated(mesh)),
  }, path
