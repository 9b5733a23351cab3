"""The one training loop: every objective, one device or many.

`run` reads in the order things happen: mesh, data, objective, optimizer, state, restore, steps.
"""

import collections
import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from PIL import Image

from beit_jax import checkpoint, convert, optim, record, sharding, train_state, trees
from beit_jax import config as config_lib
from beit_jax import evaluate as evaluation
from beit_jax.data import pipeline, sources
from beit_jax.errors import UserError
from beit_jax.logs import Logger, log
from beit_jax.objectives import OBJECTIVES, Objective
from beit_jax.train_state import TrainState


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
  with jax.set_mesh(mesh):
    if config.eval_only or not OBJECTIVES[config.objective].trains:
      return evaluation.evaluate_only(config, workdir, name or workdir.name, mesh)
    return _run(config, workdir, name or workdir.name, mesh)


def _run(config: ConfigDict, workdir: Path, name: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  began = time.monotonic()

  # Data and objective.
  _check_batch(config, mesh)
  source = sources.make_source(config.data.to_dict())
  eval_source = evaluation.eval_source(config, tuple(source.class_names))
  objective = OBJECTIVES[config.objective](config, source)
  _check_unused(config, objective)
  steps_per_epoch = len(source) // config.batch_size
  total_steps = config_lib.duration(config, "total", steps_per_epoch)
  if total_steps < 1:
    raise UserError(
      f"this run would make no update at all: {len(source)} examples are fewer than batch_size={config.batch_size}; "
      "lower batch_size or set total_steps"
    )

  # Optimizer and state.
  root = jax.random.key(config.seed)
  init = functools.partial(objective.init, jax.random.fold_in(root, 0))
  param_shapes = jax.eval_shape(init)["params"]
  schedules = make_schedules(config, steps_per_epoch, total_steps)
  tx = _optimizer(config, schedules, param_shapes, objective.depth)
  decay = config.optimizer.ema_decay
  if not 0 <= decay < 1:
    raise UserError(f"config key 'optimizer.ema_decay': {decay} must lie in [0, 1)")
  state, shapes, shardings = train_state.create(init, tx, mesh, ema=decay > 0)
  frozen = jax.device_put(objective.frozen_params(mesh), sharding.replicated(mesh))

  # Restore: own folder > resume > init_from > scratch.
  workdir.mkdir(parents=True, exist_ok=True)
  description = record.describe(config, objective, source)
  options = dict(keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous)
  with contextlib.ExitStack() as stack:
    saver = stack.enter_context(contextlib.closing(checkpoint.Checkpointer(workdir, **options)))
    state = _restore(config, objective, saver, state, shapes, shardings, description)
    best = stack.enter_context(contextlib.closing(Best(workdir, config.checkpoint.best)))
    start_step = int(state.step)
    record.write_config(config, workdir)
    _announce(
      config, name, objective, param_shapes, len(source), steps_per_epoch, start_step, total_steps, mesh
    )

    # Steps.
    train_step = make_train_step(
      objective, tx, config.microbatches, jax.random.fold_in(root, 1), shardings, decay
    )
    eval_step = evaluation.make_eval_step(objective, mesh)
    batches = _train_batches(config, objective, source, mesh, start_step, total_steps)
    logger = stack.enter_context(contextlib.closing(Logger(workdir, total_steps, name, start_step)))
    (first, last), evaluated, pending = record.logged(workdir), {}, None
    clock, clock_step = time.monotonic(), start_step

    def eval_now(step):
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

    def settle(limit):
      """Waits for all but the newest `limit` steps; a number that is none ends the run before it is saved."""
      while len(in_flight) > limit:
        at, loss, norm = in_flight.popleft()
        if not np.isfinite([float(loss), float(norm)]).all():
          raise UserError(
            f"{name}: loss {loss}, gradient norm {norm} at step {at}: lower optimizer.learning_rate or set "
            f"optimizer.clip_norm; a checkpoint in {saver.root} is from before that"
          )

    def flush():
      """Logs the step before the newest, so that the host never waits for the device with nothing queued."""
      nonlocal first, last, pending, clock, clock_step
      if pending is None:
        return
      (step, metrics), pending = pending, None
      last = {key: float(value) for key, value in jax.device_get(metrics).items()}
      now = time.monotonic()
      speed = (step - clock_step) * config.batch_size / max(now - clock, 1e-9)
      last |= {"learning_rate": float(schedules["learning_rate"](step - 1)), "images_per_second": speed}
      clock, clock_step, first = now, step, first or last
      logger.write(step, last)
      logger.progress(step, last)

    # How far the host may run ahead. Batches would pile up on the device without a bound, and several CPU
    # devices in one process can block each other for good when two steps with collectives are under way.
    ahead = 0 if mesh.size > 1 and jax.default_backend() == "cpu" else 2
    in_flight: collections.deque = collections.deque()
    for step in range(start_step + 1, total_steps + 1):
      state, metrics = train_step(state, frozen, next(batches))
      in_flight.append((step, metrics["loss"], metrics["grad_norm"]))
      settle(ahead)
      is_last = step == total_steps
      if is_last or step == start_step + 1 or step % config.log_every_steps == 0:
        flush()
        pending = step, metrics
      saving = is_last or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0)
      evaluating = not is_last and config.eval.every_steps and step % config.eval.every_steps == 0
      if is_last or saving or (eval_source and evaluating):
        flush()
        settle(0)
        if eval_source and evaluating:
          evaluated = eval_now(step)
        if saving:
          saver.save(step, state, description)
        clock, clock_step = time.monotonic(), step
    if eval_source:
      evaluated = eval_now(total_steps)
    if config.figures:
      _write_figures(config, objective, state, frozen, eval_source, source, mesh, workdir, total_steps)
  seconds = round(time.monotonic() - began, 1)
  result = dict(
    step=total_steps, seconds=seconds, first=first, last=last, eval=evaluated, examples=len(source)
  )
  record.write_result(workdir, result)
  log.info("%s: done in %.0f s, %s", name, seconds, workdir)
  return result


class Best:
  """Keeps the state of the best evaluation in workdir/best; `metric` "" keeps none."""

  def __init__(self, workdir: Path, metric: str):
    self._metric, self._saver = metric, None
    if metric:
      self._saver = checkpoint.Checkpointer(
        workdir / "best", keep=2
      )  # the one before, until the new one is sealed
      latest, before = self._saver.latest(), {}
      if latest is not None:
        before = checkpoint.read_description(self._saver.root / str(latest)).get("best", {})
      self._value = before.get("value") if before.get("metric") == metric else None

  def offer(self, step: int, metrics: dict[str, float], state: TrainState, description: dict) -> None:
    if self._saver is None or not np.isfinite(metrics[self._metric]):
      return
    value, lower = metrics[self._metric], self._metric.endswith(("loss", "mae", "mse"))
    if self._value is None or (value < self._value if lower else value > self._value):
      self._value = value
      best = {"metric": self._metric, "value": value}
      self._saver.forget_from(step)
      self._saver.save(step, state, {**description, "best": best})
      log.info("best so far: %s %.6g at step %d, kept in %s", self._metric, value, step, self._saver.root)

  def close(self) -> None:
    if self._saver is not None:
      self._saver.close()


def make_train_step(
  objective: Objective, tx, microbatches: int, root: jax.Array, shardings: TrainState, ema_decay: float = 0.0
):
  """(state, frozen, batch) -> (state, metrics), jitted, state donated: the same function for every objective.

  The loss is sum / count over the global batch, microbatches included: gradients of sums are added and divided
  once. Microbatch m takes rows m, m + M, ...: a regrouping that moves nothing between devices.
  """

  def gradients(state, frozen, batch, key):
    def loss(params):
      return objective.loss({"params": params, **state.collections}, frozen, batch, key, state.step)

    (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return grads, aux

  def train_step(state: TrainState, frozen, batch):
    key = jax.random.fold_in(root, state.step)
    if microbatches == 1:
      grads, (sums, extra) = gradients(state, frozen, batch, key)
    else:
      parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)

      def accumulate(total, part):
        index, rows = part
        grads, (sums, extra) = gradients(state, frozen, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, (grads, sums)), extra

      first = jax.tree.map(lambda x: x[0], parts)
      shapes = jax.eval_shape(gradients, state, frozen, first, key)
      zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[1][0]))
      (grads, sums), extra = jax.lax.scan(accumulate, zeros, (jnp.arange(microbatches), parts))
      extra = jax.tree.map(lambda x: x[-1], extra)
    count = jnp.maximum(sums["loss"][1], 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {name: total / jnp.maximum(n, 1.0) for name, (total, n) in sums.items()}
    metrics["grad_norm"] = optax.tree.norm(grads)
    ema = train_state.update_ema(state.ema, params, ema_decay)
    return TrainState(state.step + 1, params, extra, opt_state, ema), metrics

  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_schedules(config: ConfigDict, steps_per_epoch: int, total_steps: int) -> dict[str, Any]:
  """`learning_rate` and `weight_decay`, each (step, xp=numpy) -> value."""
  o = config.optimizer
  warmup = config_lib.duration(o, "warmup", steps_per_epoch, default=0)
  if warmup > total_steps:
    raise UserError(
      f"config key 'optimizer.warmup_steps': {warmup} is more than the {total_steps} steps of the run"
    )
  cosine = functools.partial(optim.warmup_cosine, total_steps=total_steps)
  rates = dict(peak=o.learning_rate, end=o.min_lr, warmup_steps=warmup, total_steps=total_steps)
  if o.schedule not in ("cosine", "poly"):
    raise UserError(
      f"config key 'optimizer.schedule': {o.schedule!r} is unknown; there are 'cosine' and 'poly'"
    )
  poly = functools.partial(optim.warmup_poly, power=o.power, **rates)
  end = o.weight_decay if o.weight_decay_end is None else o.weight_decay_end
  return {
    "learning_rate": poly if o.schedule == "poly" else functools.partial(optim.warmup_cosine, **rates),
    "weight_decay": functools.partial(cosine, peak=o.weight_decay, end=end, warmup_steps=0),
  }


def _optimizer(config, schedules, param_shapes, depth):
  o = config.optimizer
  constant = o.weight_decay_end is None
  return optim.make_optimizer(
    param_shapes,
    schedule=functools.partial(schedules["learning_rate"], xp=jnp),
    weight_decay=o.weight_decay if constant else functools.partial(schedules["weight_decay"], xp=jnp),
    betas=o.betas,
    eps=o.eps,
    clip_norm=o.clip_norm,
    layer_decay=o.layer_decay,
    depth=depth,
    no_decay=o.no_decay,
  )


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
  config, objective, source, mesh, start_step, total_steps
) -> Iterator[dict[str, jax.Array]]:
  host = pipeline.train_batches(
    source,
    objective.reader(),
    rows=sharding.local_rows(mesh, config.batch_size),
    batch_size=config.batch_size,
    total_steps=total_steps,
    start_step=start_step,
    seed=config.seed,
    workers=config.data.workers,
    threads=config.data.threads,
  )
  return (sharding.put_batch(mesh, batch, config.batch_size) for batch in host)


def _restore(config, objective, saver, state, shapes, shardings, description) -> TrainState:
  latest = saver.latest()
  if latest is not None:
    record.same_model(saver.root / str(latest), description)
    log.info("resuming from %s", saver.root / str(latest))
    return saver.restore(latest, shapes, shardings)
  if config.resume:
    folder = checkpoint.find(config.resume)
    if not (folder / "rest").is_dir():
      raise UserError(f"config key 'resume': {folder} holds weights only, no optimizer; use init_from")
    record.same_model(folder, description)
    log.info("resume: step, parameters and optimizer from %s", folder)
    return saver.restore(int(folder.name), shapes, shardings, root=folder.parent)
  if config.init_from:
    pretrained = convert.load(config.init_from)
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
  pictures = objective.figures({"params": state.params, **state.collections}, frozen, batch)
  folder = workdir / "figures"
  folder.mkdir(exist_ok=True)
  for name, picture in pictures.items():
    Image.fromarray(picture).save(folder / f"{name}.png")
    log.info("figure: %s", folder / f"{name}.png")
