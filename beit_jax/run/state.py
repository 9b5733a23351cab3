"""What changes from step to step, and nothing else."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from beit_jax.runtime import sharding


@flax.struct.dataclass
class TrainState:
  """The state of a run. `step` is its only clock: schedules, randomness and data position are functions of it."""

  step: jax.Array  # int32 scalar, the number of updates made
  params: Any
  collections: Any  # other Linen collections, such as batch statistics; {} for BEiT
  opt_state: optax.OptState
  ema: Any = None  # moving average of `params`, or None


def update_ema(ema: Any, params: Any, decay: float) -> Any:
  """Returns decay * ema + (1 - decay) * params, leaf by leaf; None stays None. (timm's ModelEma)"""
  return ema if ema is None else jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)


def abstract(
  init: Callable[[], Any], tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, *, ema: bool = False
) -> tuple[Callable[[], TrainState], TrainState, TrainState]:
  """Describes a fresh state without computing it.

  Args:
    init: A pure function that returns Linen variables.
    tx: The optimizer.
    mesh: The devices.
    ema: Whether to average the parameters; the average starts at the parameters.

  Returns:
    A function that makes the state, its shapes, its shardings.
  """

  def make() -> TrainState:
    variables = dict(init())
    params = variables.pop("params")
    state = TrainState(jnp.zeros((), jnp.int32), params, variables, tx.init(params))
    return dataclasses.replace(state, ema=jax.tree.map(jnp.copy, params)) if ema else state

  shapes = jax.eval_shape(make)
  return make, shapes, sharding.param_shardings(mesh, shapes)


def create(
  init: Callable[[], Any], tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, *, ema: bool = False
) -> tuple[TrainState, TrainState, TrainState]:
  """Makes a fresh state directly on its devices, so that no array ever exists unsharded; see `abstract`."""
  make, shapes, shardings = abstract(init, tx, mesh, ema=ema)
  return jax.jit(make, out_shardings=shardings)(), shapes, shardings
