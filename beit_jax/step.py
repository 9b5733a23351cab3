"""The training step, the same function for every objective, and its optimizer and schedules as the config says."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from beit_jax import optim
from beit_jax.config import parse as config_lib
from beit_jax.errors import UserError
from beit_jax.objectives import Objective
from beit_jax.run import state as train_state
from beit_jax.run.state import TrainState


def make_train_step(
  objective: Objective, tx, microbatches: int, root: jax.Array, shardings: TrainState, ema_decay: float = 0.0
):
  """(state, frozen, batch) -> (state, metrics), jitted, state donated: the same function for every objective.

  The loss is sum / count over the global batch, microbatches included: gradients of sums are added and divided
  once. Microbatch m takes rows m, m + M, ...: a regrouping that moves nothing between devices.

  Where the loss or the norm of the gradient is not finite, only the step is counted: parameters, collections, moments
  and averages stay as they are.
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
      extra = jax.tree.map(lambda x: x.mean(0), extra)  # running statistics
    count = jnp.maximum(sums["loss"][1], 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {name: total / jnp.maximum(n, 1.0) for name, (total, n) in sums.items()}
    metrics["grad_norm"] = optax.tree.norm(grads)
    ema = train_state.update_ema(state.ema, params, ema_decay)
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    new, old = (params, extra, opt_state, ema), (state.params, state.collections, state.opt_state, state.ema)
    new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    return TrainState(state.step + 1, *new), metrics

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


def make_optimizer(
  config: ConfigDict, schedules: dict[str, Any], param_shapes: Any, depth: int
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
    layer_decay=o.layer_decay,
    depth=depth,
    no_decay=o.no_decay,
  )
