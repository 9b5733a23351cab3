"""The one training loop: every objective, one device or many.

`_train` follows the order of a run: prepare (data, objective, optimizer), initial state, restore, steps, result.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from PIL import Image

from beit_jax import evaluate as evaluation
from beit_jax import optim, trees
from beit_jax.data import pipeline, sources
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.errors import UserError
from beit_jax.objectives import Objective, objective_of
from beit_jax.objectives.base import Batch, PyTree
from beit_jax.run import checkpoint, record
from beit_jax.run import state as train_state
from beit_jax.run.best import Best
from beit_jax.run.checkpointer import Checkpointer
from beit_jax.run.meter import Meter
from beit_jax.run.metric_writer import MetricWriter
from beit_jax.run.profiling import Trace
from beit_jax.run.progress import Progress
from beit_jax.run.state import TrainState
from beit_jax.runtime import bucket, distributed, preemption, sharding
from beit_jax.runtime.lock import exclusive_lock
from beit_jax.runtime.logs import log, only_file
from beit_jax.step import make_train_step
from beit_jax.train.prepare import Data, Plan, check_examples, make_data, prepare, user_errors_of_files

BAD_IMAGES = "bad_images.jsonl"
FIGURE_EXAMPLES = 16
BARRIER_SECONDS = 1800


def run(config: ConfigDict, workdir: Path, name: str = "", data: Data | None = None) -> dict[str, Any]:
  """Runs a complete config in `workdir`, continuing where an earlier call with the same folder stopped.

  Args:
    config: a complete config without stages.
    workdir: the run's folder.
    name: what the log calls the run; default: the folder's name.
    data: of `make_data`, if it is there already.

  Returns:
    The content of workdir/result.json: step, seconds of this call, `first` and `last` training metrics, `eval` metrics,
    examples, skipped_steps, bad_images. With `eval_only`, or an objective that does not train, that of
    workdir/eval.json.

  Raises:
    UserError: something that the user can fix, with what to do.
  """
  name = name or workdir.name
  finished = record.finished(config, workdir)
  if finished is not None and not config.eval_only:
    log.info("%s: finished earlier, step %d (%s)", name, finished["step"], workdir / record.RESULT)
    return finished
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  with user_errors_of_files(workdir), jax.set_mesh(mesh):
    if config.eval_only or not objective_of(config).trains:
      return evaluation.evaluate_only(config, workdir, name, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(workdir), preemption.Watch() as watch:
      return _train(config, workdir, name, mesh, watch, data)


def _train(
  config: ConfigDict,
  workdir: Path,
  name: str,
  mesh: jax.sharding.Mesh,
  watch: preemption.Watch,
  data: Data | None,
) -> dict[str, Any]:
  """Trains to the last step and writes workdir/result.json."""
  began = time.monotonic()
  data = data or make_data(config, workdir, name)
  plan = prepare(config, mesh, data)
  check_examples(plan.objective, data)
  init = functools.partial(plan.objective.init, jax.random.fold_in(jax.random.key(config.seed), 0))
  state, shapes, shardings = train_state.create(init, plan.tx, mesh, ema=config.optimizer.ema_decay > 0)
  frozen = jax.device_put(plan.objective.frozen_params(mesh), sharding.replicated(mesh))
  description = record.describe(config, plan.objective, plan.source)
  with contextlib.ExitStack() as stack:
    saver = Checkpointer(workdir, keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous)
    stack.enter_context(contextlib.closing(saver))
    state = _restore(config, plan.objective, saver, state, shapes, shardings, description)
    start_step = int(state.step)
    record.check_length(start_step, plan.total_steps)
    best = Best(workdir, config.checkpoint.best, fresh=saver.latest() is None)
    stack.enter_context(contextlib.closing(best))
    record.write_config(config, workdir)
    only_file(f"{name}: config {json.dumps(config.to_dict(), default=str)}")
    _log_plan(config, name, plan, start_step, mesh)
    loop = _Loop(
      config,
      workdir,
      name,
      mesh,
      plan=plan,
      frozen=frozen,
      description=description,
      saver=saver,
      best=best,
      watch=watch,
      start_step=start_step,
      stack=stack,
    )
    state, metrics = loop.run(state, shardings)
    if config.figures:
      _write_figures(config, plan, state, frozen, mesh, workdir, loop.logger)
  result = dict(
    step=plan.total_steps,
    seconds=round(time.monotonic() - began, 1),
    first=loop.meter.first,
    last=loop.meter.last,
    eval=metrics,
    examples=len(plan.source),
    skipped_steps=loop.meter.skipped,
  )
  bucket.push()
  distributed.barrier(f"{name}: all files of bad images are written", BARRIER_SECONDS)
  bad_images = loop.bad_images.reasons.keys() | _bad_images_of_all_processes(plan.source, workdir)
  result["bad_images"] = len(bad_images)
  record.write_result(workdir, result)
  log.info("%s: done in %.0f s, %s", name, result["seconds"], workdir)
  distributed.barrier(f"{name} is done", BARRIER_SECONDS)  # the next stage may start from its checkpoint
  return result


class _Loop:
  """The steps of a run, and what happens between them: logging, saving, evaluating, stopping.

  Attributes:
    logger: writes the metrics.
    meter: logged metrics and counts.
    bad_images: the examples that could not be read.
  """

  def __init__(
    self,
    config: ConfigDict,
    workdir: Path,
    name: str,
    mesh: jax.sharding.Mesh,
    *,
    plan: Plan,
    frozen: PyTree,
    description: dict[str, Any],
    saver: Checkpointer,
    best: Best,
    watch: preemption.Watch,
    start_step: int,
    stack: contextlib.ExitStack,
  ):
    self._config, self._name, self._mesh, self._plan, self._frozen = config, name, mesh, plan, frozen
    self._description, self._saver, self._best, self._watch = description, saver, best, watch
    self._start_step = start_step
    self.bad_images = BadImageTracker(
      plan.source, config.data.max_bad, _bad_images_file(workdir, jax.process_index()), reader=plan.reader
    )
    # An evaluation at the step that was restored may have been interrupted.
    self._redo_evaluation = start_step > 0 and self._evaluates_at(start_step)
    rewrites_evaluation = self._redo_evaluation or start_step == plan.total_steps
    self.logger = MetricWriter(
      workdir, start_step, redo_evaluation=rewrites_evaluation, wandb=config.wandb, name=name
    )
    stack.enter_context(contextlib.closing(self.logger))
    self.logger.write_hyper_parameters(record.flatten_config(config.to_dict()))
    self._progress = Progress(name, plan.total_steps, start_step)
    stack.enter_context(contextlib.closing(self._progress))
    self.meter = Meter(config, self.logger, self._progress, workdir, name, plan.schedules, start_step)
    self._trace = Trace(config.profile_steps, workdir / "profile", plan.total_steps)
    stack.enter_context(contextlib.closing(self._trace))
    self._eval_step = evaluation.make_eval_step(plan.objective, mesh)
    # Maximum number of dispatched, unfinished steps. Without a limit, batches would pile up on the device. Several CPU
    # devices in one process can deadlock if two steps with collectives are under way.
    self._max_in_flight = 0 if mesh.size > 1 and jax.default_backend() == "cpu" else 2

  def run(self, state: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, float]]:
    """Makes the remaining steps; returns the final state and the metrics of its evaluation."""
    config, plan = self._config, self._plan
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    train_step = make_train_step(
      plan.objective, plan.tx, config.microbatches, key, shardings, config.optimizer.ema_decay
    )
    batches = self._train_batches()
    if self._redo_evaluation:
      self._evaluate(self._start_step, state)
    self.meter.restart(self._start_step)
    for step in range(self._start_step + 1, plan.total_steps + 1):
      self._trace.before(step, state)
      batch = self.meter.next_batch(batches)
      if step == 1:
        state = self._with_data(state, batch, shardings)
      if step == self._start_step + 1:
        self._progress.compiling()
      state, step_metrics = train_step(state, self._frozen, batch)
      self._trace.after(step, state)
      self._watch.nothing_to_save = False
      is_logged = step in (1, plan.total_steps) or step % config.log_every_steps == 0
      self.meter.enqueue(step, step_metrics, batch, is_logged)
      self.meter.drain(self._max_in_flight)
      self._save_and_evaluate(step, state)
    return state, self._evaluate(plan.total_steps, state) if plan.eval_source is not None else {}

  def _with_data(self, state: TrainState, batch: Batch, shardings: TrainState) -> TrainState:
    """A fresh state with the collections that its objective makes from the first batch; see `Objective`."""
    make = self._plan.objective.collections_from_batch
    if make is None:
      return state
    variables = {"params": state.params, **state.collections}
    collections = jax.jit(make, out_shardings=shardings.collections)(variables, self._frozen, batch)
    return dataclasses.replace(state, collections=collections)

  def _save_and_evaluate(self, step: int, state: TrainState) -> None:
    """Saves and evaluates if it is time for that; ends the run if it was asked to stop."""
    stopping, evaluating = self._watch.requested(), self._evaluates_at(step)
    # The checkpoint must be complete before the run ends, stops or evaluates.
    must_save_now = step == self._plan.total_steps or stopping or evaluating
    every = self._config.checkpoint.every_steps
    if not (must_save_now or self._is_due(step, every) or self._saver.must_retry()):
      return
    self.meter.drain()
    if must_save_now:
      self._saver.save_and_wait(step, state, self._description)
      self._watch.saved()  # raises if the run was asked to stop
    else:
      self._saver.save(step, state, self._description)
    if evaluating:
      self._evaluate(step, state)
    self.meter.restart(step)

  def _is_due(self, step: int, every: int | None) -> bool:
    return every is not None and step % every == 0 and step < self._plan.total_steps

  def _evaluates_at(self, step: int) -> bool:
    return self._plan.eval_source is not None and self._is_due(step, self._config.eval.every_steps)

  def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
    objective, source = self._plan.objective, self._plan.eval_source
    assert source is not None
    metrics: dict[str, float] = {}
    for prefix, params in (("", state.params), ("ema_", state.ema)):
      if params is not None:
        variables = {"params": params, **state.collections}
        values, _ = evaluation.evaluate_all(
          self._config,
          objective,
          self._eval_step,
          variables,
          self._frozen,
          source,
          self._mesh,
        )
        metrics |= {prefix + key: value for key, value in values.items()}
    evaluation.check_finite(metrics, source, is_result=step == self._plan.total_steps)
    self.logger.write(step, {f"eval_{key}": value for key, value in metrics.items()})
    text = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
    log.info("%s step %d  eval  %s", self._name, step, text)
    objective.check_eval(step, metrics)
    self._best.offer(step, metrics, state, self._description)
    return metrics

  def _train_batches(self) -> Iterator[Batch]:
    """Global batches from the first remaining step on, on the devices."""
    config, plan, mesh = self._config, self._plan, self._mesh
    host = pipeline.train_batches(
      plan.source,
      plan.reader,
      rows=sharding.local_rows(mesh, config.batch_size),
      batch_size=config.batch_size,
      total_steps=plan.total_steps,
      start_step=self._start_step,
      seed=config.seed,
      workers=config.data.workers,
      threads=config.data.threads,
      bad_images=self.bad_images,
    )
    return (sharding.put_batch(mesh, batch, config.batch_size) for batch in host)


def _bad_images_file(workdir: Path, process: int) -> Path:
  """One file for all processes; in a bucket, where nothing can be appended, one for each."""
  if not (bucket.remote(workdir) and process):
    return workdir / BAD_IMAGES
  return workdir / BAD_IMAGES.replace(".", f"_{process}.")


def _bad_images_of_all_processes(source: sources.Source, workdir: Path) -> set[int]:
  files = {_bad_images_file(workdir, process) for process in range(jax.process_count())}
  return {index for file in files for index in BadImageTracker(source, 1.0, file).reasons}


def _restore(
  config: ConfigDict,
  objective: Objective,
  saver: Checkpointer,
  state: TrainState,
  shapes: TrainState,
  shardings: TrainState,
  description: dict[str, Any],
) -> TrainState:
  """The state to start from: the run's own newest checkpoint, else `resume`, else `init_from`, else `state`."""
  latest = saver.latest()
  if latest is not None:
    folder = saver.root / str(latest)
    record.check_same_model(folder, description)
    record.check_same_run(folder, config)
    record.check_same_data(folder, description)
    log.info("resuming from %s", folder)
    return saver.restore(folder, shapes, shardings)
  folder, step = checkpoint.find_resumable(config.resume) if config.resume else (None, 0)
  record.check_not_lost(saver.root.parent, step)
  if folder is not None:
    return _resume_from(folder, config, saver, shapes, shardings, description)
  if config.init_from:
    return _init_from(config.init_from, objective, state, shardings)
  return state


def _resume_from(
  folder: Path,
  config: ConfigDict,
  saver: Checkpointer,
  shapes: TrainState,
  shardings: TrainState,
  description: dict[str, Any],
) -> TrainState:
  """The full state of another run's checkpoint."""
  record.check_same_model(folder, description)
  record.check_same_data(folder, description)
  record.check_same_position(folder, checkpoint.read_config(folder), config, description)
  log.info("resume: step, parameters and optimizer from %s", folder)
  try:
    return saver.restore(folder, shapes, shardings)
  except ValueError as error:  # Orbax raises it if trees differ
    raise UserError(
      f"config key 'resume': the optimizer's state in {folder} is not that of this config:\n  "
      f"{record.section_differences(folder, config, 'optimizer') or bucket.brief(error)}\n"
      "Give the earlier values, or use init_from, which takes the weights only"
    ) from error


def _init_from(path: str, objective: Objective, state: TrainState, shardings: TrainState) -> TrainState:
  """Replaces the parameters that a checkpoint has."""
  pretrained = objective.load_start(path)
  found = objective.adapt(pretrained, state.params)
  log.info("init_from: %d tensors from %s", len(found), pretrained.description.get("path"))

  def replace(name: str, leaf: jax.Array, leaf_sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.device_put(np.asarray(found[name]), leaf_sharding) if name in found else leaf

  params = trees.named_map(replace, state.params, shardings.params)
  collections = objective.adapt_collections(pretrained, params, state.collections)
  collections = jax.device_put(collections, shardings.collections)
  ema = state.ema and jax.tree.map(jnp.copy, params)
  return dataclasses.replace(state, params=params, collections=collections, ema=ema)


def _log_plan(config: ConfigDict, name: str, plan: Plan, start_step: int, mesh: jax.sharding.Mesh) -> None:
  log.info(
    f"{name}: objective {config.objective} on {config.data.source}, {len(plan.source)} examples, {plan.total_steps} "
    f"steps of an effective batch of {config.batch_size} ({config.microbatches} microbatches, mesh "
    f"{mesh.shape['data']} x {mesh.shape['fsdp']}), {plan.steps_per_epoch} steps an epoch, from step {start_step}"
  )
  if start_step == 0:
    o = config.optimizer
    report = optim.group_report(
      plan.param_shapes,
      depth=plan.objective.depth,
      layer_decay=o.layer_decay,
      weight_decay=o.weight_decay,
      no_decay=o.no_decay,
      decay=o.decay,
    )
    only_file(f"parameter groups\n{report}")


def _write_figures(
  config: ConfigDict,
  plan: Plan,
  state: TrainState,
  frozen: PyTree,
  mesh: jax.sharding.Mesh,
  workdir: Path,
  logger: MetricWriter,
) -> None:
  """Writes the objective's figures of the first evaluation (or training) examples to workdir/figures."""
  source = plan.eval_source or plan.source
  batch = next(iter(evaluation.eval_batches(config, plan.objective, source, mesh, FIGURE_EXAMPLES)))
  variables = {"params": state.params, **state.collections}
  if jax.process_count() > 1:
    # Everything goes to process 0: eager code cannot read arrays of other processes.
    variables, frozen, batch = multihost_utils.process_allgather((variables, frozen, batch), tiled=True)
    if jax.process_index() != 0:
      return
    mesh = sharding.local_mesh()
  with jax.set_mesh(mesh):
    images = plan.objective.figures(variables, frozen, batch)
  folder = workdir / "figures"
  bucket.local(folder).mkdir(exist_ok=True)
  for name, image in images.items():
    Image.fromarray(image).save(bucket.local(folder) / f"{name}.png")
    log.info("figure: %s", folder / f"{name}.png")
  logger.write_figures(plan.total_steps, images)
