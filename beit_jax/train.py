"""The one training loop: every objective, one device or many.

`run` reads in the order things happen: mesh, plan (data, objective, optimizer), state, restore, steps.
"""

import contextlib
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from PIL import Image

from beit_jax import evaluate as evaluation
from beit_jax import optim, trees
from beit_jax.config import parse as config_lib
from beit_jax.config import ranges
from beit_jax.data import pipeline, sources
from beit_jax.data.bad_images import BadImageTracker
from beit_jax.errors import TransientError, UserError
from beit_jax.objectives import OBJECTIVES, Objective
from beit_jax.objectives.base import check_size
from beit_jax.run import checkpoint, record
from beit_jax.run import state as train_state
from beit_jax.run.best import Best
from beit_jax.run.meter import Meter
from beit_jax.run.profiling import Trace
from beit_jax.run.state import TrainState
from beit_jax.runtime import bucket, distributed, preemption, sharding
from beit_jax.runtime.lock import exclusive_lock
from beit_jax.runtime.logs import Logger, log, only_file
from beit_jax.step import make_optimizer, make_schedules, make_train_step
from beit_jax.weights import io as weights_io

BAD_IMAGES = "bad_images.jsonl"


def run(config: ConfigDict, workdir: Path, name: str = "") -> dict[str, Any]:
  """Trains what `config` asks for in `workdir`, from wherever an earlier call with the same folder stopped.

  Returns:
    The content of workdir/result.json: step, seconds, `first` and `last` training metrics, `eval` metrics.

  Raises:
    UserError: anything a user can mend, with what to do.
  """
  finished = record.finished(config, workdir)
  if finished is not None and not config.eval_only:
    log.info("%s: finished earlier, step %d (%s)", name or workdir, finished["step"], workdir / record.RESULT)
    return finished
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  try:
    with jax.set_mesh(mesh):
      if config.eval_only or not OBJECTIVES[config.objective].trains:
        return evaluation.evaluate_only(config, workdir, name or workdir.name, mesh)
      workdir.mkdir(parents=True, exist_ok=True)
      with exclusive_lock(workdir), preemption.Watch() as watch:
        return _run(config, workdir, name or workdir.name, mesh, watch)
  except (OSError, *bucket.errors()) as error:
    what = f"{getattr(error, 'filename', None) or workdir}: {getattr(error, 'strerror', None) or error}"
    raise (TransientError if bucket.is_transient(error) else UserError)(
      f"{what}. Checkpoints in {workdir} are as they were; give the same command again when it is mended"
    ) from error


class Plan(NamedTuple):
  """A run before anything is computed; `schedules`: see `make_schedules`."""

  source: Any
  eval_source: Any
  objective: Objective
  reader: Any
  param_shapes: Any
  schedules: dict[str, Any]
  tx: optax.GradientTransformation
  steps_per_epoch: int
  total_steps: int


def prepare(config: ConfigDict, mesh: jax.sharding.Mesh, source: Any = None, load: Any = None) -> Plan:
  """Data, objective, schedules, optimizer: whatever a config can get wrong is found here, before an array is made.

  Args:
    source, load: what stands in for the training data and for `weights_io.load`; there is then no evaluation.
  """
  _check_batch(config, mesh)
  eval_source = None
  if source is None:
    source = sources.make_source(config.data.to_dict())
    eval_source = evaluation.eval_source(config, tuple(source.class_names))
  objective = OBJECTIVES[config.objective](config, source, load)
  _check_unused(config, objective)
  steps_per_epoch = len(source) // config.batch_size
  total_steps = config_lib.duration(config, "total", steps_per_epoch)
  if total_steps < 1:
    raise UserError(
      f"this run would make no update at all: {len(source)} examples are fewer than batch_size={config.batch_size}; "
      "lower batch_size or set total_steps"
    )
  if total_steps > ranges.STEPS:
    raise UserError(f"config key 'total_epochs': {total_steps} steps are more than {ranges.STEPS:,}")
  schedules = make_schedules(config, steps_per_epoch, total_steps)
  shapes = jax.eval_shape(functools.partial(objective.init, jax.random.key(0)))["params"]
  check_size(shapes)
  tx = make_optimizer(config, schedules, shapes, objective.depth)
  reader = objective.reader()
  return Plan(source, eval_source, objective, reader, shapes, schedules, tx, steps_per_epoch, total_steps)


def _run(
  config: ConfigDict, workdir: Path, name: str, mesh: jax.sharding.Mesh, watch: preemption.Watch
) -> dict[str, Any]:
  began = time.monotonic()

  plan = prepare(config, mesh)
  source, eval_source, objective = plan.source, plan.eval_source, plan.objective
  param_shapes, schedules, tx = plan.param_shapes, plan.schedules, plan.tx
  steps_per_epoch, total_steps = plan.steps_per_epoch, plan.total_steps
  decay, root = config.optimizer.ema_decay, jax.random.key(config.seed)
  init = functools.partial(objective.init, jax.random.fold_in(root, 0))
  state, shapes, shardings = train_state.create(init, tx, mesh, ema=decay > 0)
  frozen = jax.device_put(objective.frozen_params(mesh), sharding.replicated(mesh))

  # Restore: own folder > resume > init_from > scratch.
  description = record.describe(config, objective, source)
  options = dict(keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous)
  with contextlib.ExitStack() as stack:
    saver = stack.enter_context(contextlib.closing(checkpoint.Checkpointer(workdir, **options)))
    state = _restore(config, objective, saver, state, shapes, shardings, description)
    start_step = int(state.step)
    record.check_length(start_step, total_steps)
    best = Best(workdir, config.checkpoint.best, fresh=saver.latest() is None)
    stack.enter_context(contextlib.closing(best))
    record.write_config(config, workdir)
    only_file(f"{name}: config {json.dumps(config.to_dict(), default=str)}")
    _announce(
      config, name, objective, param_shapes, len(source), steps_per_epoch, start_step, total_steps, mesh
    )

    # Steps.
    def due(step, every):
      return bool(every) and step % every == 0 and step < total_steps

    train_step = make_train_step(
      objective, tx, config.microbatches, jax.random.fold_in(root, 1), shardings, decay
    )
    eval_step = evaluation.make_eval_step(objective, mesh)
    tracker = BadImageTracker(source, config.data.max_bad, _bad_images(workdir, jax.process_index()))
    batches = _train_batches(config, plan.reader, source, mesh, start_step, total_steps, tracker)
    redo_evaluation = eval_source is not None and due(start_step, config.eval.every_steps) and start_step > 0
    logger = Logger(
      workdir, total_steps, name, start_step, again=redo_evaluation or start_step == total_steps
    )
    stack.enter_context(contextlib.closing(logger))
    meter = Meter(config, logger, workdir, name, schedules, start_step)
    trace = Trace(config.profile_steps, workdir / "profile", total_steps)
    stack.enter_context(contextlib.closing(trace))

    def evaluate(step):
      metrics = {}
      for prefix, params in (("", state.params), ("ema_", state.ema)):
        if params is not None:
          variables = {"params": params, **state.collections}
          values, _ = evaluation.evaluate_all(
            config, objective, eval_step, variables, frozen, eval_source, mesh
          )
          metrics |= {prefix + key: value for key, value in values.items()}
      logger.write(step, {f"eval_{key}": value for key, value in metrics.items()})
      log.info("%s step %d  eval  %s", name, step, "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
      objective.check_eval(step, metrics)
      best.offer(step, metrics, state, description)
      return metrics

    evaluated = evaluate(start_step) if redo_evaluation else {}  # it may have been cut short
    # How far the host may run ahead. Batches would pile up on the device without a bound, and several CPU
    # devices in one process can block each other for good when two steps with collectives are under way.
    max_in_flight = 0 if mesh.size > 1 and jax.default_backend() == "cpu" else 2
    meter.restart(start_step)
    for step in range(start_step + 1, total_steps + 1):
      trace.before(step, state)
      batch = meter.next_batch(batches)
      state, metrics = train_step(state, frozen, batch)
      trace.after(step, state)
      watch.nothing_to_save = False
      is_last = step == total_steps
      meter.enqueue(step, metrics, batch, is_last or step == 1 or step % config.log_every_steps == 0)
      meter.drain(max_in_flight)
      stopping = watch.requested()
      evaluating = eval_source is not None and due(step, config.eval.every_steps)
      must_save_now = is_last or stopping or evaluating  # on disk before anything else is begun
      if must_save_now or due(step, config.checkpoint.every_steps) or saver.must_retry():
        meter.drain()
        saver.save(step, state, description)
        while must_save_now and not saver.wait():
          saver.save(step, state, description)
        if must_save_now:
          watch.saved()
        if evaluating:
          evaluated = evaluate(step)
        meter.restart(step)
    if eval_source is not None:
      evaluated = evaluate(total_steps)
    if config.figures:
      _write_figures(config, objective, state, frozen, eval_source, source, mesh, workdir, total_steps)
  seconds = round(time.monotonic() - began, 1)
  result = dict(step=total_steps, seconds=seconds, first=meter.first, last=meter.last, eval=evaluated)
  bucket.push()
  distributed.barrier(f"{name}: all bad images are named", 1800)
  num_bad = len(tracker.reasons.keys() | _bad_of_all(source, workdir))
  result |= dict(examples=len(source), skipped_steps=meter.skipped, bad_images=num_bad)
  record.write_result(workdir, result)
  log.info("%s: done in %.0f s, %s", name, seconds, workdir)
  distributed.barrier(f"{name} is done", 1800)  # a next stage begins with its checkpoint
  return result


def _bad_images(workdir: Path, process: int) -> Path:
  """One file for all processes; in a bucket, where nothing can be appended, one for each."""
  if not (bucket.remote(workdir) and process):
    return workdir / BAD_IMAGES
  return workdir / BAD_IMAGES.replace(".", f"_{process}.")


def _bad_of_all(source, workdir) -> set[int]:
  """The examples that any process has named."""
  files = {_bad_images(workdir, process) for process in range(jax.process_count())}
  return {index for file in files for index in BadImageTracker(source, 1.0, file).reasons}


def _check_unused(config, objective) -> None:
  """Refuses a `checkpoint.best` that will never be evaluated, and says which augmentation has no effect."""
  best, names = config.checkpoint.best, objective.eval_metrics
  names = names + tuple(f"ema_{name}" for name in names if config.optimizer.ema_decay)
  if best and (best not in names or not config.eval.split):
    raise UserError(
      f"config key 'checkpoint.best': {best!r} is not evaluated (eval.split={config.eval.split!r}); there are "
      + ", ".join(names)
    )
  for key in ("color_jitter", "random_erasing"):
    if config.data[key] and key not in objective.augmentations:
      log.warning("config key 'data.%s' has no effect on the objective %s", key, config.objective)


def _check_batch(config, mesh) -> None:
  if config.microbatches < 1 or config.batch_size % (config.microbatches * mesh.size):
    raise UserError(
      f"config key 'batch_size': {config.batch_size} must be a multiple of microbatches={config.microbatches} x "
      f"{mesh.size} devices"
    )


def _train_batches(
  config, reader, source, mesh, start_step, total_steps, bad_images
) -> Iterator[dict[str, jax.Array]]:
  host = pipeline.train_batches(
    source,
    reader,
    rows=sharding.local_rows(mesh, config.batch_size),
    batch_size=config.batch_size,
    total_steps=total_steps,
    start_step=start_step,
    seed=config.seed,
    workers=config.data.workers,
    threads=config.data.threads,
    bad_images=bad_images,
  )
  return (sharding.put_batch(mesh, batch, config.batch_size) for batch in host)


def _restore(config, objective, saver, state, shapes, shardings, description) -> TrainState:
  latest = saver.latest()
  if latest is not None:
    record.check_same_model(saver.root / str(latest), description)
    record.check_same_run(saver.root / str(latest), config)
    record.check_same_data(saver.root / str(latest), description)
    log.info("resuming from %s", saver.root / str(latest))
    return saver.restore(saver.root / str(latest), shapes, shardings)
  folder, begun = checkpoint.find_resumable(config.resume) if config.resume else (None, 0)
  record.check_not_lost(saver.root.parent, begun)
  if folder:
    record.check_same_model(folder, description)
    record.check_same_data(folder, description)
    log.info("resume: step, parameters and optimizer from %s", folder)
    try:
      return saver.restore(folder, shapes, shardings)
    except ValueError as error:  # Orbax's, of trees that differ
      raise UserError(
        f"config key 'resume': the optimizer's state in {folder} is not that of this config:\n  "
        f"{record.differing(folder, config, 'optimizer') or bucket.brief(error)}\n"
        "Give the values of before, or init_from, which takes the weights only"
      ) from error
  if config.init_from:
    pretrained = weights_io.load(config.init_from)
    found = objective.adapt(pretrained, state.params)
    log.info("init_from: %d tensors from %s", len(found), pretrained.description.get("path"))
    params = trees.named_map(
      lambda name, leaf, sharding: (
        jax.device_put(np.asarray(found[name]), sharding) if name in found else leaf
      ),
      state.params,
      shardings.params,
    )
    return state.replace(params=params, ema=state.ema and jax.tree.map(jnp.copy, params))
  return state


def _announce(config, name, objective, shapes, examples, per_epoch, start_step, total_steps, mesh) -> None:
  o = config.optimizer
  log.info(
    "%s: objective %s on %s, %d examples, %d steps of an effective batch of %d (%d microbatches, mesh %d x %d), "
    "%d steps an epoch, from step %d",
    *(
      name,
      config.objective,
      config.data.source,
      examples,
      total_steps,
      config.batch_size,
      config.microbatches,
    ),
    *(mesh.shape["data"], mesh.shape["fsdp"], per_epoch, start_step),
  )
  report = optim.group_report(
    shapes, depth=objective.depth, layer_decay=o.layer_decay, weight_decay=o.weight_decay, no_decay=o.no_decay
  )
  if start_step == 0:
    log.info("parameter groups\n%s", report)


def _write_figures(config, objective, state, frozen, eval_source, source, mesh, workdir, step) -> None:
  batch = next(iter(evaluation.eval_batches(config, objective, eval_source or source, mesh, 16)))
  variables = {"params": state.params, **state.collections}
  if (
    jax.process_count() > 1
  ):  # all of it, to one device of process 0: eager code cannot look at what others hold
    variables, frozen, batch = multihost_utils.process_allgather((variables, frozen, batch), tiled=True)
    if jax.process_index() != 0:
      return
    mesh = sharding.local_mesh()
  with jax.set_mesh(mesh):
    pictures = objective.figures(variables, frozen, batch)
  folder = workdir / "figures"
  bucket.local(folder).mkdir(exist_ok=True)
  for name, picture in pictures.items():
    Image.fromarray(picture).save(bucket.local(folder) / f"{name}.png")
    log.info("figure: %s", folder / f"{name}.png")
