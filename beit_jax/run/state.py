"""What changes from step to step, and nothing else."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from beit_jax.runtime import sharding


@flax.struct.dataclass
class TrainState:
  """`step` is the only clock: schedules, randomness and the data position are functions of it."""

  step: jax.Array  # int32 scalar, the number of updates made
  params: Any
  collections: Any  # other Linen collections; {} for BEiT
  opt_state: optax.OptState
  ema: Any = None  # averaged parameters, where a run keeps them


def update_ema(ema: Any, params: Any, decay: float) -> Any:
  """decay * ema + (1 - decay) * params, leaf by leaf; None stays None. (timm ModelEma, the same decay throughout.)"""
  return ema if ema is None else jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)


def abstract(
  init: Callable[[], Any], tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, *, ema: bool = False
) -> tuple[Callable[[], TrainState], TrainState, TrainState]:
  """(a function that makes the state, its shapes, its shardings): nothing is computed yet.

  Args:
    init: () -> Linen variables, pure.
    ema: also keep averaged parameters, which start as the parameters.
  """

  def make():
    variables = dict(init())
    params = variables.pop("params")
    state = TrainState(jnp.zeros((), jnp.int32), params, variables, tx.init(params))
    return state.replace(ema=jax.tree.map(jnp.copy, params)) if ema else state

  shapes = jax.eval_shape(make)
  return make, shapes, sharding.param_shardings(mesh, shapes)


def create(init, tx, mesh, *, ema: bool = False) -> tuple[TrainState, TrainState, TrainState]:
  """(state, its shapes, its shardings), made directly on its devices: nothing is ever materialised unsharded."""
  make, shapes, shardings = abstract(init, tx, mesh, ema=ema)
  return jax.jit(make, out_shardings=shardings)(), shapes, shardings
