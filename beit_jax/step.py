"""The jitted training step, and the optimizer and schedules that the config describes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from beit_jax import optim
from beit_jax.config import parse
from beit_jax.errors import UserError
from beit_jax.objectives import LossOutput, Objective
from beit_jax.objectives.base import Batch, PyTree
from beit_jax.run import state as train_state
from beit_jax.run.state import TrainState

# (state, frozen, batch, key) -> (gradients of the summed loss, output of the loss)
Gradients = Callable[[TrainState, PyTree, Batch, jax.Array], tuple[PyTree, LossOutput]]


def make_train_step(
  objective: Objective,
  tx: optax.GradientTransformation,
  microbatches: int,
  root: jax.Array,
  shardings: TrainState,
  ema_decay: float = 0.0,
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Makes the jitted training step, the same function for every objective.

  The loss is sum / count over the global batch. If the loss or the norm of the gradient is not finite, the step is
  counted and everything else stays as it is.

  Args:
    objective: what is trained.
    tx: the optimizer.
    microbatches: number of parts in which the batch is run, with the same result.
    root: key of the run's randomness; every step folds its number into it.
    shardings: of the new state.
    ema_decay: of averaged parameters; only used if the state has some.

  Returns:
    (state, frozen, batch) -> (state, metrics). The state is donated. `metrics` are means over the batch, and grad_norm.
  """
  compute = _gradients(objective)
  if microbatches > 1:
    compute = _accumulated(compute, microbatches)

  def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    grads, output = compute(state, frozen, batch, jax.random.fold_in(root, state.step))
    count = jnp.maximum(output.metrics["loss"].n, 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = tx.update(grads, optim.at_step(state.opt_state, state.step), state.params)
    params = optax.apply_updates(state.params, updates)
    collections = {**state.collections, **output.collections}
    collections = objective.after_update(params, collections, output.statistics, state.step)
    metrics = {name: total / jnp.maximum(n, 1.0) for name, (total, n) in output.metrics.items()}
    metrics["grad_norm"] = optax.tree.norm(grads)
    ema = train_state.update_ema(state.ema, params, ema_decay)
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    new = TrainState(state.step + 1, params, collections, opt_state, ema)
    old = dataclasses.replace(state, step=state.step + 1)
    return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old), metrics

  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _gradients(objective: Objective) -> Gradients:
  def gradients(state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array) -> tuple[PyTree, LossOutput]:
    def loss(params: PyTree) -> tuple[jax.Array, LossOutput]:
      output = objective.loss({"params": params, **state.collections}, frozen, batch, key, state.step)
      return output.metrics["loss"].total, output

    return jax.grad(loss, has_aux=True)(state.params)

  return gradients


def _accumulated(gradients: Gradients, microbatches: int) -> Gradients:
  """Runs a batch in parts, one after the other: sums are added, collections are averaged.

  Microbatch m holds the rows m, m + M, ... of the batch, so that regrouping moves nothing between devices.
  """

  def accumulated(
    state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array
  ) -> tuple[PyTree, LossOutput]:
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)

    def add(total: PyTree, part: tuple[jax.Array, Batch]) -> tuple[PyTree, PyTree]:
      index, rows = part
      grads, output = gradients(state, frozen, rows, jax.random.fold_in(key, index))
      sums = (grads, output.metrics, output.statistics)
      return jax.tree.map(jnp.add, total, sums), output.collections

    first = jax.tree.map(lambda x: x[0], parts)
    grads, output = jax.eval_shape(gradients, state, frozen, first, key)
    shapes = (grads, output.metrics, output.statistics)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, collections = jax.lax.scan(add, zeros, (jnp.arange(microbatches), parts))
    grads, metrics, statistics = sums
    return grads, LossOutput(metrics, jax.tree.map(lambda x: x.mean(0), collections), statistics)

  return accumulated


def make_schedules(config: ConfigDict, steps_per_epoch: int, total_steps: int) -> dict[str, Any]:
  """`learning_rate` and `weight_decay`, each (step, xp=numpy) -> value."""
  o = config.optimizer
  warmup = parse.duration(o, "warmup", steps_per_epoch, default=0)
  if warmup > total_steps:
    raise UserError(
      f"config key 'optimizer.warmup_steps': {warmup} is more than the {total_steps} steps of the run"
    )
  cosine = functools.partial(optim.warmup_cosine, total_steps=total_steps)
  rates = dict(peak=o.learning_rate, end=o.min_lr, warmup_steps=warmup, total_steps=total_steps)
  poly = functools.partial(optim.warmup_poly, power=o.power, **rates)
  end = o.weight_decay if o.weight_decay_end is None else o.weight_decay_end
  return {
    "learning_rate": poly if o.schedule == "poly" else functools.partial(optim.warmup_cosine, **rates),
    "weight_decay": functools.partial(cosine, peak=o.weight_decay, end=end, warmup_steps=0),
  }


def make_optimizer(
  config: ConfigDict,
  schedules: dict[str, Any],
  param_shapes: Any,
  depth: int,
  delayed: dict[str, int] | None = None,
) -> optax.GradientTransformation:
  """`optim.make_optimizer` with the numbers of the config's `optimizer` section."""
  o = config.optimizer
  constant = o.weight_decay_end is None
  return optim.make_optimizer(
    param_shapes,
    schedule=functools.partial(schedules["learning_rate"], xp=jnp),
    weight_decay=o.weight_decay if constant else functools.partial(schedules["weight_decay"], xp=jnp),
    name=o.name,
    betas=o.betas,
    eps=o.eps,
    momentum=o.momentum,
    clip_norm=o.clip_norm,
    clip=o.clip,
    layer_decay=o.layer_decay,
    depth=depth,
    no_decay=o.no_decay,
    decay=o.decay,
    delayed=delayed,
  )
